"""Reports: the terminal page, the HTML page, and exports for memory and trace viewers."""

from memopt.files import check_writable
from memopt.report.boxes import Box, boxes_of
from memopt.report.html import write_html
from memopt.report.perfetto import write_perfetto
from memopt.report.snapshot import write_snapshot

__all__ = ["Box", "boxes_of", "check_writable", "write_html", "write_perfetto", "write_snapshot"]
