"""One file per rule, each with the element-wise update written once and the optimizer class that feeds it."""
