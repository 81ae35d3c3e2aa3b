// A machine for the kernels that is made of host threads, one for each of the device's, written from the PTX manual and not from
// hopper.cuh. It is as hostile as the manual allows: shared memory starts as NaN; in a "late" run copies land in any order and products
// read their operands when they are waited for, otherwise both happen at once.
#pragma once
#include <barrier>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "layout.h"

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct Place3 {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local Place3 threadIdx, blockIdx;

namespace machine {

constexpr uint32_t BASE = 3 * 1024, SIZE = 232448;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "machine: %s (block %u %u %u, thread %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
  std::_Exit(3);
}
inline void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

// PTX "mbarrier": a phase ends when no arrivals and no bytes are pending.
struct Barrier {
  std::mutex mutex;
  std::condition_variable ended;
  int arrivals, pending;
  int64_t bytes = 0;
  uint32_t phase = 0;

  explicit Barrier(int arrivals_) : arrivals(arrivals_), pending(arrivals_) {}
  void change(int arrived, int64_t more_bytes) {
    std::lock_guard lock(mutex);
    pending -= arrived;
    bytes += more_bytes;
    require(pending >= 0, "more arrivals than a barrier expects");
    if (pending || bytes) return;
    pending = arrivals;
    phase ^= 1;
    ended.notify_all();
  }
  void wait(uint32_t parity) {
    std::unique_lock lock(mutex);
    if (!ended.wait_for(lock, std::chrono::seconds(20), [&] { return phase != parity; })) fail("deadlock: a barrier was never passed");
  }
};

struct Warp {
  std::barrier<> meeting{32};
  uint64_t values[32];
};

struct Block {
  std::vector<uint8_t> shared = std::vector<uint8_t>(SIZE, 0xff);
  std::map<uint32_t, std::unique_ptr<Barrier>> barriers;
  std::barrier<> meeting;
  std::vector<Warp> warps;
  // the engine of copies
  std::mutex mutex;
  std::condition_variable arrived;
  std::vector<std::function<void()>> copies;
  bool over = false;

  explicit Block(int threads) : meeting(threads), warps(threads / 32) {}
  void run_copies(unsigned seed) {
    std::mt19937 random(seed);
    for (std::unique_lock lock(mutex);;) {
      arrived.wait(lock, [&] { return over || !copies.empty(); });
      if (copies.empty()) return;
      // others come in the meantime, and may overtake
      lock.unlock();
      std::this_thread::sleep_for(std::chrono::microseconds(300));
      lock.lock();
      std::swap(copies[random() % copies.size()], copies.back());
      const auto copy = std::move(copies.back());
      copies.pop_back();
      lock.unlock();
      copy();
      lock.lock();
    }
  }
};

inline bool late = false;
inline thread_local Block* block = nullptr;
inline thread_local std::deque<std::vector<std::function<void()>>> groups;
inline thread_local std::vector<std::function<void()>> open_group;

inline Barrier& barrier_at(uint32_t address) {
  const auto found = block->barriers.find(address);
  require(found != block->barriers.end(), "no barrier at this address");
  return *found->second;
}

inline uint8_t* memory(uint32_t address, uint32_t bytes) {
  require(address >= BASE && address + bytes <= BASE + SIZE, "outside of shared memory");
  return block->shared.data() + address - BASE;
}

// "Swizzling modes": of 128 bytes, address bits 4-6 are exchanged by exclusive or with bits 7-9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline float decode(uint16_t bits, emca::cuda::Number number) {
  if (number == emca::cuda::Number::bfloat16) return std::bit_cast<float>(uint32_t(bits) << 16);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = std::ldexp(float(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
  if (exponent == 31) value = fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  return bits >> 15 ? -value : value;
}

// "Shared memory matrix layout", K-major: element (row, channel) of a tile that a descriptor tells of.
inline float element(uint64_t descriptor, int row, int channel, emca::cuda::Number number) {
  require(descriptor >> 62 == 1, "another swizzle than 128 bytes");
  require((descriptor >> 49 & 7) == 0, "a base offset");
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, eight_rows = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  uint16_t bits;
  std::memcpy(&bits, memory(swizzled(start + row / 8 * eight_rows + row % 8 * 128 + channel * 2), 2), 2);
  return decode(bits, number);
}

// Runs a kernel block by block, which is one of the orders that a device may take.
template <class Kernel>
void run(Place3 grid, int threads, unsigned seed, const Kernel& kernel) {
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        Block own(threads);
        std::vector<std::jthread> running;
        for (int thread = 0; thread < threads; ++thread)
          running.emplace_back([&, thread] {
            blockIdx = {x, y, z};
            threadIdx = {unsigned(thread), 0, 0};
            block = &own;
            kernel();
            require(groups.empty() && open_group.empty(), "products that nobody waited for");
          });
        std::jthread engine([&] {
          block = &own;
          own.run_copies(seed);
        });
        running.clear();
        std::lock_guard lock(own.mutex);
        own.over = true;
        own.arrived.notify_all();
      }
}

}  // namespace machine

inline void __syncthreads() { machine::block->meeting.arrive_and_wait(); }

template <class T>
T __shfl_sync(unsigned lanes, T value, int source) {
  machine::require(lanes == ~0u, "part of a warp");
  machine::Warp& warp = machine::block->warps[threadIdx.x / 32];
  std::memcpy(&warp.values[threadIdx.x % 32], &value, sizeof(T));
  warp.meeting.arrive_and_wait();
  std::memcpy(&value, &warp.values[source % 32], sizeof(T));
  warp.meeting.arrive_and_wait();
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int flipped) {
  return __shfl_sync(lanes, value, int(threadIdx.x % 32) ^ flipped);
}

namespace emca::cuda {

// [images, rows, channels] in memory and the box that a copy brings
struct TensorMap {
  const uint16_t* data;
  int images, rows, channels;
  int64_t image_stride, row_stride;
  int box_rows;
};

inline uint32_t shared_base() { return machine::BASE; }
inline void barrier_init(uint32_t barrier, int arrivals) {
  machine::memory(barrier, 8);
  machine::block->barriers[barrier] = std::make_unique<machine::Barrier>(arrivals);
}
inline void barriers_ready() {}
inline void barrier_arrive(uint32_t barrier) { machine::barrier_at(barrier).change(1, 0); }
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  machine::Barrier& own = machine::barrier_at(barrier);
  own.change(0, bytes);
  own.change(1, 0);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) { machine::barrier_at(barrier).wait(parity); }

inline void copy_panel(uint32_t to, const TensorMap& map, int channel, int row, int image, uint32_t barrier) {
  machine::require(to % 1024 == 0, "a swizzled panel that is not aligned");
  machine::require(channel + 64 <= map.channels && row < map.rows && image < map.images, "a box outside of its tensor");
  const auto copy = [=] {
    for (int r = 0; r < map.box_rows; ++r)
      for (int c = 0; c < 64; ++c) {
        const uint16_t value = row + r < map.rows ? map.data[image * map.image_stride + (row + r) * map.row_stride + channel + c] : 0;
        std::memcpy(machine::memory(machine::swizzled(to + r * 128 + c * 2), 2), &value, 2);
      }
    machine::barrier_at(barrier).change(0, -int64_t(map.box_rows) * 128);
  };
  if (!machine::late) return copy();
  std::lock_guard lock(machine::block->mutex);
  machine::block->copies.push_back(copy);
  machine::block->arrived.notify_one();
}

template <int COUNT>
void pin(float (&)[COUNT]) {}
// ".sync.aligned": the lanes of a warp go on together.
inline void meet_warp() { machine::block->warps[threadIdx.x / 32].meeting.arrive_and_wait(); }
inline void products_begin() { meet_warp(); }

// "Register fragments", accumulator D of .m64nNk16: this thread's numbers.
template <Number NUMBER, int TILE>
void product(float (&scores)[TILE / 2], uint64_t queries, uint64_t pixels, uint32_t add) {
  const int thread = int(threadIdx.x % 128);
  const auto work = [=, &scores] {
    for (int i = 0; i < TILE / 2; ++i) {
      const int row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (thread % 4) + i % 2;
      float sum = add ? scores[i] : 0.f;
      for (int k = 0; k < 16; ++k) sum += machine::element(queries, row, k, NUMBER) * machine::element(pixels, column, k, NUMBER);
      scores[i] = sum;
    }
  };
  if (machine::late)
    machine::open_group.push_back(work);
  else
    work();
}

inline void products_commit() {
  machine::groups.push_back(std::move(machine::open_group));
  machine::open_group.clear();
}
inline void complete_all_but(size_t count) {
  for (; machine::groups.size() > count; machine::groups.pop_front())
    for (const auto& work : machine::groups.front()) work();
  meet_warp();
}
inline void products_wait_but_last() { complete_all_but(1); }
template <int COUNT>
void products_wait(float (&)[COUNT]) {
  complete_all_but(0);
}

inline float max_nan(float one, float other) {
  return std::isnan(one) || std::isnan(other) ? std::numeric_limits<float>::quiet_NaN() : std::max(one, other);
}
// unrounded: the test rounds as it likes
template <Number>
void store_score(void* scores, int64_t at, float score) {
  static_cast<float*>(scores)[at] = score;
}
inline void let_next_start() {}
inline void wait_for_previous() {}

}  // namespace emca::cuda
