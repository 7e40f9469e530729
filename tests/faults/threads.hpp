// OpenMP's entry points on plain threads, for ThreadSanitizer: it follows thread creation and joins, but not what the
// system's OpenMP library does, which is not built for it. Compiled into each library by "-include", hidden from others.
#pragma once
#include <atomic>
#include <thread>
#include <vector>

#define HIDDEN extern "C" __attribute__((visibility("hidden")))

namespace omp_on_threads {
struct Team {
  unsigned size;
  std::atomic<long> next{0};
  std::atomic<long> end{0}, chunk{1};
};
inline thread_local Team* team = nullptr;
inline thread_local unsigned number = 0;
}  // namespace omp_on_threads

HIDDEN int omp_get_thread_num() { return static_cast<int>(omp_on_threads::number); }
HIDDEN int omp_get_num_threads() {
  return omp_on_threads::team == nullptr ? 1 : static_cast<int>(omp_on_threads::team->size);
}

namespace omp_on_threads {
inline void together(void (*body)(void*), void* data, unsigned threads, long end, long chunk) {
  Team team;
  team.size = threads == 0 ? 1 : threads;
  team.end = end;
  team.chunk = chunk;
  const auto run = [&](unsigned number) {
    Team* outer = omp_on_threads::team;
    const unsigned before = omp_on_threads::number;
    omp_on_threads::team = &team;
    omp_on_threads::number = number;
    body(data);
    omp_on_threads::team = outer;
    omp_on_threads::number = before;
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < team.size; ++i) others.emplace_back(run, i);
  run(0);
  for (std::thread& other : others) other.join();
}
}  // namespace omp_on_threads

HIDDEN void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  omp_on_threads::together(body, data, threads, 0, 1);
}

// A parallel loop of a length that the compiler knows, whose iterations threads take as they come.
HIDDEN void GOMP_parallel_loop_nonmonotonic_dynamic(void (*body)(void*), void* data, unsigned threads, long, long end,
                                                    long, long chunk, unsigned) {
  omp_on_threads::together(body, data, threads, end, chunk);
}

HIDDEN bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) {
  omp_on_threads::Team& team = *omp_on_threads::team;
  const long end = team.end, chunk = team.chunk, at = team.next.fetch_add(chunk);
  if (at >= end) return false;
  *first = at;
  *last = at + chunk < end ? at + chunk : end;
  return true;
}

// The kernels' loops count up from 0 by 1, one loop in each parallel region.
HIDDEN bool GOMP_loop_nonmonotonic_dynamic_start(long, long end, long, long chunk, long* first, long* last) {
  omp_on_threads::Team& team = *omp_on_threads::team;
  team.end = end;
  team.chunk = chunk;
  return GOMP_loop_nonmonotonic_dynamic_next(first, last);
}

HIDDEN void GOMP_loop_end_nowait() {}
