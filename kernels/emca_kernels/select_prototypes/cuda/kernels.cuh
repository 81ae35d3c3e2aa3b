// The two kernels: the best pixel of each query in each split of an image, and the best of those. Include a machine first: hopper.cuh.
#pragma once
#include <cstdint>

#include "key.h"
#include "layout.h"
#include "masks.cuh"
#include "problem.h"

namespace emca::cuda {

constexpr int MERGE_THREADS = 256;

// A warp for each.
constexpr unsigned merge_blocks(int64_t count) { return unsigned((count * 32 + MERGE_THREADS - 1) / MERGE_THREADS); }

// A place in the ring of slots, and the parity of the phase that its barriers are in.
struct Place {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance(int stages) {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

// The block's share of the work.
struct Share {
  int image, query_block, split, first_tile, last_tile;

  __device__ explicit Share(const Problem& problem)
      : image(int(blockIdx.z)), query_block(int(blockIdx.y)), split(int(blockIdx.x)), first_tile(problem.grid.first_tile(split)),
        last_tile(problem.grid.first_tile(split + 1)) {}
};

__device__ inline void prepare_barriers(const Room& room, uint32_t base) {
  for (int stage = 0; stage < room.stages; ++stage) {
    barrier_init(base + room.full(stage), 1);
    // every warp has its own part of a product, and reads all pixels for it
    barrier_init(base + room.empty(stage), room.groups * GROUP_THREADS / 32);
  }
  barrier_init(base + room.queries_ready(), 1);
  barriers_ready();
}

// One thread: queries once, then panel after panel of pixels, as slots become free.
__device__ inline void produce(const Problem& problem, const Share& share, uint32_t base, const TensorMap& features,
                               const TensorMap& position, const TensorMap& queries) {
  const Room& room = problem.room;
  const uint32_t ready = base + room.queries_ready();
  barrier_expect(ready, room.panels * room.query_panel_bytes());
  for (int panel = 0; panel < room.panels; ++panel)
    copy_panel(base + room.query_panel(panel), queries, panel * PANEL_CHANNELS, share.query_block * room.queries(),
               share.image * problem.queries_step, ready);
  Place place;
  for (int tile = share.first_tile; tile < share.last_tile; ++tile)
    for (int source = 0; source < problem.sources; ++source)
      for (int panel = 0; panel < room.panels; ++panel) {
        // the first round passes: the phase before the first counts as over
        barrier_wait(base + room.empty(place.stage), place.parity ^ 1);
        const uint32_t full = base + room.full(place.stage);
        barrier_expect(full, room.slot_bytes());
        copy_panel(base + room.slot(place.stage), source ? position : features, panel * PANEL_CHANNELS, tile * room.tile,
                   share.image * (source ? problem.position_step : problem.features_step), full);
        place.advance(room.stages);
      }
}

// What a warp says when it has read a slot; the products that did are over, so the copy that comes next cannot overtake them.
__device__ inline void release(const Room& room, uint32_t base, int stage) {
  if (threadIdx.x % 32 == 0) barrier_arrive(base + room.empty(stage));
}

// Scores of the warpgroup's queries and the pixels of the next tile. A slot is free when the products after it are on their way.
template <Number NUMBER, int TILE>
__device__ inline void multiply(const Room& room, int sources, uint32_t base, int group, Place& place, float (&scores)[TILE / 2]) {
  int previous = 0;
  pin(scores);
  for (int source = 0; source < sources; ++source)
    for (int panel = 0; panel < room.panels; ++panel) {
      const bool first = !source && !panel;
      barrier_wait(base + room.full(place.stage), place.parity);
      const uint32_t queries = base + room.query_panel(panel) + group * GROUP_QUERIES * PANEL_ROW_BYTES, pixels = base + room.slot(place.stage);
      products_begin();
#pragma unroll
      for (int step = 0; step < PANEL_CHANNELS / STEP_CHANNELS; ++step)
        product<NUMBER, TILE>(scores, matrix_descriptor(queries + step * STEP_BYTES), matrix_descriptor(pixels + step * STEP_BYTES),
                              !first || step);
      products_commit();
      if (!first) {
        products_wait_but_last();
        release(room, base, previous);
      }
      previous = place.stage;
      place.advance(room.stages);
    }
  products_wait(scores);
  release(room, base, previous);
}

// The best pixel that a thread has met for a query: of the allowed ones as soon as the query has met one, of all of them before.
struct Best {
  float score = LOWEST;
  uint32_t pixel = NOWHERE;
  bool allowed = false;
};

// Most tiles bring nothing better, which the maximum tells; the pixel is looked for in those that do. A lower pixel wins: those of later
// tiles are higher.
template <int TILE, int ROW, bool FULL>
__device__ inline void offer(Best& best, const float (&scores)[TILE / 2], const Bits<TILE>& usable, int first) {
  const int own = first_pixel(threadIdx.x % 32);
  const Bits<TILE> bits = usable.shifted(own);
  float maximum = LOWEST;
#pragma unroll
  for (int i = 0; i < TILE / 4; ++i) {
    const float score = scores[accumulator(i / 2, ROW, i % 2)];
    maximum = max_nan(maximum, FULL || bits.at(i / 2 * 8 + i % 2) ? score : LOWEST);
  }
  if (!beats(maximum, best.score)) return;
  best.score = maximum;
#pragma unroll
  for (int i = TILE / 4 - 1; i >= 0; --i) {
    const float score = scores[accumulator(i / 2, ROW, i % 2)];
    const bool same = score == maximum || (score != score && maximum != maximum);
    if (same && (FULL || bits.at(i / 2 * 8 + i % 2))) best.pixel = first + own + i / 2 * 8 + i % 2;
  }
}

template <Mask MASK, int TILE, int ROW>
__device__ inline void update(Best& best, const float (&scores)[TILE / 2], const Bits<TILE>& allowed, int first, int pixels) {
  const Bits<TILE> inside = Bits<TILE>::first(pixels - first);
  if constexpr (MASK == Mask::none) {
    if (first + TILE <= pixels)
      offer<TILE, ROW, true>(best, scores, inside, first);
    else
      offer<TILE, ROW, false>(best, scores, inside, first);
  } else {
    // the same for the four lanes of a query; blocked pixels count until then
    if (!best.allowed && (allowed & inside).any()) best = Best{LOWEST, NOWHERE, true};
    const Bits<TILE> tolerated = Bits<TILE>::first(best.allowed ? 0 : TILE);
    offer<TILE, ROW, false>(best, scores, inside & (allowed | tolerated), first);
  }
}

// Four lanes share a query.
__device__ inline void write_key(const Problem& problem, const Share& share, int query, const Best& best) {
  uint64_t key = make_key(best.allowed, best.score, best.pixel);
  for (int step = 1; step < 4; step *= 2) {
    const uint64_t other = __shfl_xor_sync(ALL_LANES, key, step);
    key = other > key ? other : key;
  }
  if (threadIdx.x % 4 == 0 && query < problem.queries)
    problem.keys[(int64_t(share.image) * problem.queries + query) * problem.grid.splits + share.split] = key;
}

// A warpgroup: 64 queries of the block, tile after tile.
template <Number NUMBER, int TILE, Mask MASK>
__device__ inline void consume(const Problem& problem, const Share& share, uint32_t base, int group) {
  const int query = share.query_block * problem.room.queries() + group * GROUP_QUERIES + first_query(threadIdx.x % GROUP_THREADS);
  Best best[2];
  Place place;
  float scores[TILE / 2];
  barrier_wait(base + problem.room.queries_ready(), 0);
  for (int tile = share.first_tile; tile < share.last_tile; ++tile) {
    const int first = tile * TILE;
    MaskRow<MASK, TILE> rows[2];
    rows[0].read(problem, share.image, query, first);
    rows[1].read(problem, share.image, query + 8, first);
    multiply<NUMBER, TILE>(problem.room, problem.sources, base, group, place, scores);
    update<MASK, TILE, 0>(best[0], scores, rows[0].bits(), first, problem.pixels);
    update<MASK, TILE, 1>(best[1], scores, rows[1].bits(), first, problem.pixels);
  }
  write_key(problem, share, query, best[0]);
  write_key(problem, share, query + 8, best[1]);
}

// Grid (splits, blocks of queries, images). One or two warpgroups that multiply and compare, then one warp that copies.
template <Number NUMBER, int TILE, Mask MASK>
__global__ void __launch_bounds__(MAX_GROUPS* GROUP_THREADS + 32, 1)
    best_of_splits(const __grid_constant__ TensorMap features, const __grid_constant__ TensorMap position,
                   const __grid_constant__ TensorMap queries, const __grid_constant__ Problem problem) {
  const uint32_t base = shared_base();
  const Share share(problem);
  // uniform, and known to be
  const int group = __shfl_sync(ALL_LANES, int(threadIdx.x / GROUP_THREADS), 0);
  if (threadIdx.x == 0) prepare_barriers(problem.room, base);
  __syncthreads();
  let_next_start();
  if (group < problem.room.groups)
    consume<NUMBER, TILE, MASK>(problem, share, base, group);
  else if (threadIdx.x % 32 == 0)
    produce(problem, share, base, features, position, queries);
}

// A warp per query of an image: the best of its splits, in the numbers of the features. Grid over warps.
template <Number NUMBER>
__global__ void __launch_bounds__(MERGE_THREADS)
    best_of_all(const uint64_t* keys, int64_t count, int splits, int64_t* indices, void* scores) {
  const int64_t at = (int64_t(blockIdx.x) * MERGE_THREADS + threadIdx.x) / 32;
  const int lane = int(threadIdx.x % 32);
  wait_for_previous();
  if (at >= count) return;
  uint64_t key = 0;
  for (int split = lane; split < splits; split += 32) key = keys[at * splits + split] > key ? keys[at * splits + split] : key;
  for (int step = 16; step; step /= 2) {
    const uint64_t other = __shfl_xor_sync(ALL_LANES, key, step);
    key = other > key ? other : key;
  }
  if (lane) return;
  indices[at] = key_pixel(key);
  store_score<NUMBER>(scores, at, key_score(key));
}

}  // namespace emca::cuda
