// Depth-first placement on a skyline. memopt/planner/placement/skyline.py is the readable reference: the same steps
// under the same names, integers only, the same result for the same arguments.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

namespace {

using std::vector;
using i64 = std::int64_t;
using i32 = std::int32_t;
constexpr i64 kFailedBound = 64;
constexpr i64 kNever = std::numeric_limits<i64>::max();
enum Verdict { kExhausted = 0, kFound = 1, kOutOfNodes = 2, kOutOfTime = 3 };

i64 log2_fixed(i64 x) {
  const int power = 63 - __builtin_clzll(static_cast<unsigned long long>(x));
  return (static_cast<i64>(power) << 16) + ((x << 16) >> power) - (i64{1} << 16);
}

struct Range {
  i32 low = std::numeric_limits<i32>::max(), high = 0;
  bool meets(Range other) const { return low < other.high && other.low < high; }
  void add(Range other) {
    low = std::min(low, other.low);
    high = std::max(high, other.high);
  }
};

struct Node {
  vector<i32> members;
  std::size_t mark = 0, inner_mark = 0;
  i32 chosen = -1;
  vector<vector<i32>> pending;
  vector<std::pair<Range, Range>> tried;
};

// What a trail entry restores.
enum Kind : i32 { kSkyline, kGround, kPlaced, kSkipped };
struct Change {
  Kind kind;
  i32 index;
  i64 value;
};

struct Search {
  i32 count, sections;
  const i32 *low, *high;
  const i64* size;
  const i32 *near_start, *near, *twins;
  i64 capacity;
  const i64* fixed;
  i64 crowd, conflict_weight, waste;
  i64* failures;
  i64* offsets;
  vector<i64> skyline, level, ground, lowest;
  vector<char> placed, skipped;
  vector<i32> order;
  vector<Change> trail;
  Range conflict;

  void start() {
    skyline.assign(sections, 0);
    level.assign(sections, 0);
    ground.assign(count, 0);
    lowest.assign(count, 0);
    placed.assign(count, 0);
    skipped.assign(count, 0);
  }

  Range window(i32 b) const { return {low[b], high[b]}; }

  Verdict run(i64 node_limit, double seconds, i64* nodes) {
    using Clock = std::chrono::steady_clock;
    const auto begin = Clock::now();
    start();
    vector<Node> stack(1);
    stack[0].members.resize(count);
    std::iota(stack[0].members.begin(), stack[0].members.end(), 0);
    bool solved = false, failed = false;
    while (!stack.empty()) {
      if (solved) {
        if (stack.back().pending.empty()) {
          stack.pop_back();
          continue;
        }
        Node next;
        next.members = std::move(stack.back().pending.back());
        next.mark = trail.size();
        stack.back().pending.pop_back();
        stack.push_back(std::move(next));
        solved = false;
      } else if (failed) {
        Node& node = stack.back();
        undo(node.inner_mark);
        if (!conflict.meets(window(node.chosen))) {
          leave(stack);
          continue;
        }
        node.tried.push_back({window(node.chosen), conflict});
        skip(node);
      }
      Node& node = stack.back();
      if (++*nodes > node_limit) return kOutOfNodes;
      if (*nodes % 32 == 0 && std::chrono::duration<double>(Clock::now() - begin).count() > seconds) return kOutOfTime;
      failed = !bound(node.members);
      if (!failed) {
        node.chosen = choose(node.members);
        if (node.chosen < 0) {
          failed = true;
          conflict = {};
          for (i32 b : node.members) conflict.add(window(b));
        }
      }
      if (failed) {
        leave(stack);
        continue;
      }
      node.inner_mark = trail.size();
      put(node);
      solved = true;
    }
    return solved ? kFound : kExhausted;
  }

  void leave(vector<Node>& stack) {
    Node& node = stack.back();
    undo(node.mark);
    for (auto it = node.tried.rbegin(); it != node.tried.rend(); ++it)
      if (conflict.meets(it->first)) {
        conflict.add(it->first);
        conflict.add(it->second);
      }
    stack.pop_back();
  }

  void undo(std::size_t mark) {
    while (trail.size() > mark) {
      const Change change = trail.back();
      trail.pop_back();
      switch (change.kind) {
        case kSkyline: skyline[change.index] = change.value; break;
        case kGround: ground[change.index] = change.value; break;
        case kPlaced: placed[change.index] = static_cast<char>(change.value); break;
        case kSkipped: skipped[change.index] = static_cast<char>(change.value); break;
      }
    }
  }

  void add_reason(i32 b) {
    conflict.add(window(b));
    if (!skipped[b]) return;
    for (i32 i = near_start[b]; i < near_start[b + 1]; ++i)
      if (!placed[near[i]]) conflict.add(window(near[i]));
  }

  bool bound(const vector<i32>& members) {
    Range whole;
    for (i32 b : members) {
      lowest[b] = ground[b];
      whole.add(window(b));
      if (!skipped[b]) continue;
      i64 end = kNever;
      for (i32 i = near_start[b]; i < near_start[b + 1]; ++i) {
        const i32 k = near[i];
        if (!placed[k]) end = std::min(end, std::max(ground[k] + size[k], ground[b] + 1));
      }
      if (end == kNever) {
        conflict = window(b);
        return false;
      }
      lowest[b] = end;
    }
    std::copy(skyline.begin() + whole.low, skyline.begin() + whole.high, level.begin() + whole.low);
    order = members;
    std::sort(order.begin(), order.end(),
              [&](i32 x, i32 y) { return lowest[x] != lowest[y] ? lowest[x] < lowest[y] : x < y; });
    for (std::size_t position = 0; position < order.size(); ++position) {
      const i32 b = order[position];
      const i64 at = lowest[b], bytes = size[b];
      for (i32 s = low[b]; s < high[b]; ++s) {
        const i64 reached = std::max(level[s], at) + bytes;
        level[s] = reached;
        if (reached <= capacity) continue;
        failures[s] += kFailedBound;
        conflict = {};
        for (std::size_t i = 0; i <= position; ++i)
          if (window(order[i]).meets({s, s + 1})) add_reason(order[i]);
        return false;
      }
    }
    for (i32 b : members) {
      if (!skipped[b]) continue;
      const i64 end = ground[b] + size[b];
      bool drops = true;
      for (i32 i = near_start[b]; drops && i < near_start[b + 1]; ++i) drops = placed[near[i]] || lowest[near[i]] >= end;
      if (!drops) continue;
      conflict = window(b);
      for (i32 i = near_start[b]; i < near_start[b + 1]; ++i)
        if (!placed[near[i]]) add_reason(near[i]);
      return false;
    }
    return true;
  }

  i32 choose(const vector<i32>& members) const {
    i64 lowest_ground = kNever;
    for (i32 b : members)
      if (!skipped[b]) lowest_ground = std::min(lowest_ground, ground[b]);
    i32 best = -1;
    i64 best_score = 0;
    for (i32 b : members) {
      if (skipped[b] || ground[b] != lowest_ground) continue;
      i64 fullest = 0, failed = 0, gap = 0;
      for (i32 s = low[b]; s < high[b]; ++s) {
        fullest = std::max(fullest, level[s]);
        failed = std::max(failed, failures[s]);
        gap += lowest_ground - skyline[s];
      }
      gap /= high[b] - low[b];
      const i64 score = fixed[b] + crowd * ((fullest << 16) / capacity) +
                        conflict_weight * log2_fixed(kFailedBound + failed) - waste * ((gap << 16) / capacity);
      if (best < 0 || score > best_score) {
        best = b;
        best_score = score;
      }
    }
    return best;
  }

  void put(Node& node) {
    const i32 b = node.chosen;
    const i64 top = ground[b] + size[b];
    offsets[b] = ground[b];
    trail.push_back({kPlaced, b, 0});
    placed[b] = 1;
    for (i32 s = low[b]; s < high[b]; ++s) {
      trail.push_back({kSkyline, s, skyline[s]});
      skyline[s] = top;
    }
    for (i32 i = near_start[b]; i < near_start[b + 1]; ++i) {
      const i32 k = near[i];
      if (placed[k] || ground[k] >= top) continue;
      trail.push_back({kGround, k, ground[k]});
      ground[k] = top;
      if (!skipped[k]) continue;
      trail.push_back({kSkipped, k, 1});
      skipped[k] = 0;
    }
    node.pending.clear();
    i32 end = 0;
    for (i32 k : node.members) {
      if (k == b) continue;
      if (node.pending.empty() || low[k] >= end) node.pending.emplace_back();
      node.pending.back().push_back(k);
      end = std::max(end, high[k]);
    }
    std::reverse(node.pending.begin(), node.pending.end());
  }

  void skip(const Node& node) {
    for (i32 k : node.members) {
      if (twins[k] != twins[node.chosen] || skipped[k]) continue;
      trail.push_back({kSkipped, k, 0});
      skipped[k] = 1;
    }
  }
};

}  // namespace

// The neighbours of buffer b are near[near_start[b]] to near[near_start[b + 1] - 1]; weights is {crowd, conflict,
// waste}; failures (per section) is read and added to; offsets is written. Returns a Verdict.
extern "C" i32 memopt_skyline(i32 count, i32 sections, const i32* low, const i32* high, const i64* size,
                              const i32* near_start, const i32* near, const i32* twins, i64 capacity, const i64* fixed,
                              const i64* weights, i64* failures, i64 node_limit, double seconds, i64* offsets,
                              i64* nodes) {
  Search search{count, sections, low,   high,       size,       near_start, near,     twins,
                capacity, fixed, weights[0], weights[1], weights[2], failures,   offsets};
  *nodes = 0;
  return search.run(node_limit, seconds, nodes);
}
