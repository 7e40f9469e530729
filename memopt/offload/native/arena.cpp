// An allocator that gives the n-th allocation of a training step the address planned for it. memopt/offload/arena.py
// says what is covered and why it is safe; the device's own malloc and free are handed in as addresses.
#include <sys/types.h>

#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using i64 = std::int64_t;
using DeviceMalloc = int (*)(void**, std::size_t);
using DeviceFree = int (*)(void*);
using ClearError = int (*)();
enum Mode { kOff = 0, kRecord = 1, kReplay = 2 };
enum EventKind : i64 { kAllocated = 0, kFreed = 1, kShared = 2 };
constexpr i64 kUnplanned = -1;
constexpr i64 kGranule = 512;  // bytes; what torch's own allocator rounds to

i64 rounded(i64 size) { return (size + kGranule - 1) / kGranule * kGranule; }

// A block that the device's allocator gave.
struct Passed {
  i64 size, index, recording;  // index: of the allocation in the recording numbered `recording`, or kUnplanned
  void* stream;
  bool shared = false;  // another stream uses it, too
};

// A block inside a region.
struct Placed {
  i64 size;
  bool shared = false, freed = false;
};

// One contiguous piece of device memory; a retired one goes back when its last block is freed.
struct Region {
  char* base;
  i64 bytes;
  bool retired = false;
  std::map<i64, Placed> live;  // by offset; never overlapping

  bool holds(const void* at) const { return at >= base && at < base + bytes; }
  bool free_at(i64 offset, i64 size) const {
    auto next = live.lower_bound(offset);
    if (next != live.end() && next->first < offset + size) return false;
    return next == live.begin() || std::prev(next)->first + std::prev(next)->second.size <= offset;
  }
};

struct Device {
  std::mutex mutex;
  DeviceMalloc give = nullptr;
  DeviceFree take = nullptr;
  ClearError clear = nullptr;  // a failed malloc would otherwise be reported by the next kernel launch
  Mode mode = kOff;
  void* stream = nullptr;  // the step's compute stream
  i64 next = 0, recording = 0;
  std::vector<i64> events;  // triples of kind, index, bytes
  std::vector<i64> sizes, offsets;
  std::unique_ptr<Region> region;
  std::vector<std::unique_ptr<Region>> retired;
  std::unordered_map<void*, Passed> passed;
  std::map<std::pair<void*, i64>, std::vector<void*>> cached;  // freed blocks by stream and size
  i64 hits = 0, changed = 0, late = 0, changed_at = 0, changed_size = 0;
  i64 passed_bytes = 0, cached_bytes = 0;
  bool lingering = false;

  void log(EventKind kind, i64 index, i64 size) { events.insert(events.end(), {kind, index, size}); }

  void flush() {
    for (auto& [key, blocks] : cached)
      for (void* block : blocks) take(block);
    cached.clear();
    cached_bytes = 0;
  }

  void* fresh(i64 size) {
    for (int attempt = 0; attempt < 2; ++attempt) {
      void* at = nullptr;
      if (give(&at, static_cast<std::size_t>(size)) == 0 && at) return at;
      if (clear) clear();
      flush();
    }
    return nullptr;
  }

  void* pass(i64 size, i64 index, void* on) {
    void* at = nullptr;
    auto kept = cached.find({on, size});
    if (kept != cached.end()) {
      at = kept->second.back();
      kept->second.pop_back();
      if (kept->second.empty()) cached.erase(kept);
      cached_bytes -= size;
    } else {
      at = fresh(size);
    }
    if (!at) return nullptr;
    passed[at] = Passed{size, index, index == kUnplanned ? kUnplanned : recording, on};
    passed_bytes += size;
    return at;
  }

  void* allocate(i64 asked, void* on) {
    const i64 size = rounded(asked);
    if (mode == kOff || on != stream) return pass(size, kUnplanned, on);
    const i64 n = next++;
    if (mode == kRecord) {
      log(kAllocated, n, size);
      return pass(size, n, on);
    }
    if (n >= static_cast<i64>(sizes.size()) || sizes[n] != size) {
      if (!changed++) changed_at = n, changed_size = size;
      return pass(size, kUnplanned, on);
    }
    if (offsets[n] == kUnplanned) return pass(size, kUnplanned, on);
    if (!region->free_at(offsets[n], size)) {
      ++late;
      return pass(size, kUnplanned, on);
    }
    ++hits;
    region->live.emplace(offsets[n], Placed{size});
    return region->base + offsets[n];
  }

  Region* region_of(const void* at) {
    if (region && region->holds(at)) return region.get();
    for (auto& old : retired)
      if (old->holds(at)) return old.get();
    return nullptr;
  }

  void release(void* at) {
    auto known = passed.find(at);
    if (known != passed.end()) {
      const Passed block = known->second;
      passed.erase(known);
      passed_bytes -= block.size;
      if (mode == kRecord && block.recording == recording) log(kFreed, block.index, block.size);
      if (block.shared) {
        take(at);  // the device waits for every stream before it takes memory back
      } else {
        cached[{block.stream, block.size}].push_back(at);
        cached_bytes += block.size;
      }
    } else if (Region* owner = region_of(at)) {
      auto block = owner->live.find(static_cast<char*>(at) - owner->base);
      if (block == owner->live.end()) return;
      if (block->second.shared) {
        block->second.freed = lingering = true;  // until the device has been waited for
      } else {
        owner->live.erase(block);
        sweep();
      }
    }
  }

  void share(void* at, void* on) {
    auto known = passed.find(at);
    if (known != passed.end()) {
      if (on == known->second.stream) return;
      known->second.shared = true;
      if (mode == kRecord && known->second.recording == recording) log(kShared, known->second.index, 0);
    } else if (Region* owner = region_of(at)) {
      auto block = owner->live.find(static_cast<char*>(at) - owner->base);
      if (block != owner->live.end() && on != stream) block->second.shared = true;
    }
  }

  void sweep() {
    for (auto old = retired.begin(); old != retired.end();) {
      if ((*old)->live.empty()) {
        take((*old)->base);
        old = retired.erase(old);
      } else {
        ++old;
      }
    }
  }

  void retire() {
    if (region) retired.push_back(std::move(region));
    sizes.clear();
    offsets.clear();
    sweep();
  }

  void settle() {
    auto drop = [](Region& from) {
      for (auto block = from.live.begin(); block != from.live.end();)
        block = block->second.freed ? from.live.erase(block) : std::next(block);
    };
    if (region) drop(*region);
    for (auto& old : retired) drop(*old);
    lingering = false;
    sweep();
  }
};

using Guard = std::lock_guard<std::mutex>;

// Never destroyed: tensors that live until the process ends are freed after static destructors have run.
struct Devices {
  std::mutex mutex;
  std::map<int, Device> by_index;
};
Devices& devices() {
  static auto* all = new Devices;
  return *all;
}

Device& device_at(int index) {
  Guard guard(devices().mutex);
  return devices().by_index[index];
}

}  // namespace

extern "C" {

void arena_open(int index, DeviceMalloc give, DeviceFree take, ClearError clear) {
  Device& device = device_at(index);
  Guard guard(device.mutex);
  device.give = give;
  device.take = take;
  device.clear = clear;
}

// What torch calls; a thrown error becomes Python's RuntimeError there.
void* arena_malloc(ssize_t size, int index, void* stream) {
  if (size <= 0) return nullptr;
  Device& device = device_at(index);
  void* at = nullptr;
  {
    Guard guard(device.mutex);
    if (device.give) at = device.allocate(size, stream);
  }
  if (!at)
    throw std::runtime_error("memopt.offload.Arena: out of memory on device " + std::to_string(index) + ", " +
                             std::to_string(size) + " bytes asked for");
  return at;
}

void arena_free(void* at, ssize_t, int index, void*) {
  if (!at) return;
  Device& device = device_at(index);
  Guard guard(device.mutex);
  device.release(at);
}

// torch names no device here: all are asked, and only the owner knows the address.
void arena_share(void* at, void* stream) {
  Guard all(devices().mutex);
  for (auto& [index, device] : devices().by_index) {
    Guard guard(device.mutex);
    device.share(at, stream);
  }
}

void arena_begin(int index, int mode, void* stream) {
  Device& device = device_at(index);
  Guard guard(device.mutex);
  device.mode = static_cast<Mode>(mode);
  device.stream = stream;
  device.next = device.hits = device.changed = device.late = 0;
  if (mode == kRecord) {
    ++device.recording;
    device.events.clear();
  }
}

void arena_end(int index) {
  Device& device = device_at(index);
  Guard guard(device.mutex);
  device.mode = kOff;
}

// Copies at most `room` numbers of the log, three an event; returns how many there are.
i64 arena_log(int index, i64* out, i64 room) {
  Device& device = device_at(index);
  Guard guard(device.mutex);
  const i64 count = static_cast<i64>(device.events.size());
  for (i64 i = 0; i < count && i < room; ++i) out[i] = device.events[i];
  return count;
}

// Takes over a plan; an offset of -1 passes the allocation through. Returns the region's address, null without memory.
void* arena_adopt(int index, i64 count, const i64* sizes, const i64* offsets, i64 bytes) {
  Device& device = device_at(index);
  Guard guard(device.mutex);
  device.retire();
  device.flush();
  void* base = device.fresh(bytes);
  if (!base) return nullptr;
  device.region = std::make_unique<Region>();
  device.region->base = static_cast<char*>(base);
  device.region->bytes = bytes;
  device.sizes.assign(sizes, sizes + count);
  device.offsets.assign(offsets, offsets + count);
  return base;
}

// Gives up the plan, and what was freed; the region goes when its last block has been freed.
void arena_retire(int index) {
  Device& device = device_at(index);
  Guard guard(device.mutex);
  device.retire();
  device.flush();
}

// Blocks that were freed while another stream used them; call with the device idle.
void arena_settle(int index) {
  Device& device = device_at(index);
  Guard guard(device.mutex);
  device.settle();
}

// Twelve numbers, in the order of arena_native.Counters.
void arena_counters(int index, i64* out) {
  Device& device = device_at(index);
  Guard guard(device.mutex);
  i64 regions = device.region ? device.region->bytes : 0, retired = 0;
  for (auto& old : device.retired) retired += old->bytes;
  const i64 at = device.changed_at;
  const i64 planned = device.changed && at < static_cast<i64>(device.sizes.size()) ? device.sizes[at] : 0;
  const i64 all[] = {device.next,  device.hits, device.changed,      device.late,         at,     device.changed_size,
                     planned, regions,     retired, device.passed_bytes, device.cached_bytes, device.lingering};
  for (i64 i = 0; i < 12; ++i) out[i] = all[i];
}

}  // extern "C"
