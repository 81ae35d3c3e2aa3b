// Who computes what, and where it lies: splits of an image, shared memory, operands and accumulators of wgmma. Plain C++, so that a host can
// check it.
#pragma once
#include <cstdint>

namespace emca::cuda {

enum class Number { bfloat16, float16 };
// none; bool bytes; bits in 32-bit words
enum class Mask { none, bytes, words };

// A panel is 64 channels of some rows: 128 bytes a row, as wide as the widest swizzle.
constexpr int PANEL_CHANNELS = 64, PANEL_ROW_BYTES = 128;
// One wgmma takes 16 channels of 64 queries, the rows of a warpgroup's accumulators, and of 32, 64 or 128 pixels.
constexpr int STEP_CHANNELS = 16, STEP_BYTES = 2 * STEP_CHANNELS, GROUP_QUERIES = 64, GROUP_THREADS = 128;
constexpr int MAX_GROUPS = 2, MAX_STAGES = 24, MAX_CHANNELS = 256;
// What a block may have on compute capability 9.0, and the alignment of what is swizzled.
constexpr uint32_t SHARED_LIMIT = 232448, SHARED_ALIGNMENT = 1024, BARRIER_BYTES = 8;

constexpr int divide_up(int whole, int part) { return (whole + part - 1) / part; }

// Shared memory of a block, as offsets from an aligned address: all panels of its queries, a ring of slots for panels of pixels, barriers.
struct Room {
  int groups, panels, tile, stages;

  // those that multiply, and a warp that copies
  constexpr int threads() const { return groups * GROUP_THREADS + 32; }
  constexpr int queries() const { return groups * GROUP_QUERIES; }
  constexpr uint32_t query_panel_bytes() const { return queries() * PANEL_ROW_BYTES; }
  constexpr uint32_t slot_bytes() const { return tile * PANEL_ROW_BYTES; }
  constexpr uint32_t query_panel(int panel) const { return panel * query_panel_bytes(); }
  constexpr uint32_t slot(int stage) const { return query_panel(panels) + stage * slot_bytes(); }
  constexpr uint32_t full(int stage) const { return slot(stages) + stage * BARRIER_BYTES; }
  constexpr uint32_t empty(int stage) const { return full(stages) + stage * BARRIER_BYTES; }
  constexpr uint32_t queries_ready() const { return empty(stages); }
  // wherever the block's memory begins
  constexpr uint32_t bytes() const { return queries_ready() + BARRIER_BYTES + SHARED_ALIGNMENT; }
};

// As many slots as there is room for.
constexpr Room make_room(int groups, int panels, int tile) {
  Room room{groups, panels, tile, MAX_STAGES};
  while (room.bytes() > SHARED_LIMIT) --room.stages;
  return room;
}

// How a call is split: blocks of queries and, for each of them and each image, `splits` runs of neighbouring tiles of pixels.
struct Grid {
  int tiles, query_blocks, splits;

  constexpr int first_tile(int split) const { return int(int64_t(split) * tiles / splits); }
};

struct Plan {
  Room room;
  Grid grid;
};

// The number of splits that ends first: waves of blocks, each as long as its tiles and a start that costs about one more.
constexpr int choose_splits(int tiles, int64_t problems, int processors) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int splits = 1; splits <= (tiles < processors ? tiles : processors); ++splits) {
    const int64_t waves = (problems * splits + processors - 1) / processors, time = waves * (divide_up(tiles, splits) + 1);
    if (time < least) best = splits, least = time;
  }
  return best;
}

// The largest tile that leaves no multiprocessor without work.
constexpr Plan make_plan(int images, int pixels, int queries, int channels, int processors) {
  const int groups = queries > GROUP_QUERIES ? MAX_GROUPS : 1, query_blocks = divide_up(queries, groups * GROUP_QUERIES);
  const int64_t problems = int64_t(images) * query_blocks;
  int tile = 128;
  while (tile > 32 && divide_up(pixels, tile) * problems < processors) tile /= 2;
  const int tiles = divide_up(pixels, tile);
  return {make_room(groups, channels / PANEL_CHANNELS, tile), {tiles, query_blocks, choose_splits(tiles, problems, processors)}};
}

// Tells wgmma of rows of channels in shared memory: start, 1024 bytes from eight rows to the next eight, swizzle of 128 bytes. The step
// between columns of panels is not used with it. (PTX, "matrix descriptor")
constexpr uint64_t matrix_descriptor(uint32_t address) {
  constexpr uint64_t unused = 1, eight_rows = 8 * PANEL_ROW_BYTES >> 4, swizzle_128 = 1;
  return uint64_t((address & 0x3ffff) >> 4) | unused << 16 | eight_rows << 32 | swizzle_128 << 62;
}

// Accumulators of a thread: two queries, `row` 0 and 1, eight apart, and of each eight pixels two neighbours, `side` 0 and 1.
constexpr int accumulator(int eight, int row, int side) { return 4 * eight + 2 * row + side; }
constexpr int first_query(int thread) { return thread / 32 * 16 + thread % 32 / 4; }
constexpr int first_pixel(int lane) { return 2 * (lane % 4); }

// The lowest bits of eight bytes, the first one lowest.
constexpr uint32_t bits_of_bytes(uint64_t bytes) { return uint32_t((bytes & 0x0101010101010101) * 0x0102040810204080 >> 56); }

// A word whose first `count` bits are set.
constexpr uint32_t first_bits(int count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

}  // namespace emca::cuda
