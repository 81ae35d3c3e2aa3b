// Checks layout.h and key.h against first principles; says what does not hold.
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <vector>

#include "key.h"
#include "layout.h"

namespace {

using namespace emca::cuda;

#define REQUIRE(...)                                                        \
  do {                                                                      \
    if (!(__VA_ARGS__)) {                                                   \
      std::fprintf(stderr, "line %d: not %s\n", __LINE__, #__VA_ARGS__);    \
      std::exit(1);                                                         \
    }                                                                       \
  } while (false)

// As torch.max orders: NaN above all, zeros alike.
bool above(float one, float other) { return std::isnan(one) ? !std::isnan(other) : one > other; }

void check_keys(std::mt19937& random) {
  std::vector<float> scores = {0.f, -0.f, 1.f, -1.f, 1e-45f, -1e-45f, 3.4e38f, -3.4e38f, INFINITY, -INFINITY, NAN, -NAN};
  for (int i = 0; i < 500; ++i) scores.push_back(std::bit_cast<float>(uint32_t(random())));
  for (float one : scores)
    for (float other : scores) {
      const bool alike = !above(one, other) && !above(other, one);
      REQUIRE((ordered(one) > ordered(other)) == above(one, other));
      REQUIRE(beats(one, other) == above(one, other));
      REQUIRE((make_key(false, one, 7) > make_key(false, other, 7)) == above(one, other));
      REQUIRE((make_key(true, one, 5) > make_key(true, other, 4)) == above(one, other));
      REQUIRE((make_key(true, one, 4) > make_key(true, other, 5)) == (above(one, other) || alike));
      REQUIRE(make_key(true, one, NOWHERE) > make_key(false, other, 0));
    }
  for (float score : scores) {
    const uint32_t pixel = random() % NOWHERE;
    const uint64_t key = make_key(random() % 2, score, pixel);
    REQUIRE(key > 0);
    REQUIRE(std::isnan(score) ? std::isnan(key_score(key)) : key_score(key) == score);
    REQUIRE(key_pixel(key) == (score == -INFINITY ? 0 : int64_t(pixel)));
  }
}

void check_bits(std::mt19937& random) {
  for (uint32_t bits = 0; bits < 256; ++bits) {
    uint64_t bytes = 0;
    for (int i = 0; i < 8; ++i) bytes |= uint64_t(bits >> i & 1) << 8 * i;
    REQUIRE(bits_of_bytes(bytes) == bits);
    REQUIRE(bits_of_bytes(bytes | ((uint64_t(random()) << 32 | random()) & 0xfefefefefefefefe)) == bits);
  }
  for (int count = -40; count < 70; ++count)
    for (int bit = 0; bit < 32; ++bit) REQUIRE((first_bits(count) >> bit & 1) == (bit < count));
}

// PTX, "matrix descriptor": 14 bits of start, 14 of the leading and 14 of the stride byte offset, all in units of 16 bytes, base offset in
// bits 49-51, swizzle in bits 62-63; a 1 there means 128 bytes.
void check_descriptors() {
  for (uint32_t panel = 0; panel + 1024 <= SHARED_LIMIT; panel += 1024)
    for (uint32_t step = 0; step < 4; ++step) {
      const uint64_t descriptor = matrix_descriptor(panel + step * STEP_BYTES);
      REQUIRE((descriptor & 0x3fff) * 16 == panel + step * 32);
      REQUIRE((descriptor >> 32 & 0x3fff) * 16 == 1024);
      REQUIRE((descriptor >> 14 & 3) == 0 && (descriptor >> 30 & 3) == 0 && descriptor >> 46 == 1u << 16);
    }
}

// Every score of 64 queries and 8 `eights` pixels is some thread's, and one thread's only.
void check_accumulators(int eights) {
  std::set<std::pair<int, int>> scores;
  std::set<int> registers;
  for (int thread = 0; thread < GROUP_THREADS; ++thread)
    for (int eight = 0; eight < eights; ++eight)
      for (int row = 0; row < 2; ++row)
        for (int side = 0; side < 2; ++side) {
          scores.insert({first_query(thread) + 8 * row, 8 * eight + first_pixel(thread % 32) + side});
          registers.insert(accumulator(eight, row, side));
        }
  REQUIRE(scores.size() == size_t(64 * 8 * eights) && scores.begin()->first == 0 && scores.rbegin()->first == 63);
  REQUIRE(registers.size() == size_t(4 * eights) && *registers.begin() == 0 && *registers.rbegin() == 4 * eights - 1);
}

void check_room(const Room& room) {
  REQUIRE(room.bytes() <= SHARED_LIMIT);
  // a slot that is multiplied, one that is released after it, and copies on their way
  REQUIRE(room.stages >= 4 && room.stages <= MAX_STAGES);
  REQUIRE(room.query_panel(1) % SHARED_ALIGNMENT == 0 && room.slot(0) % SHARED_ALIGNMENT == 0 && room.slot_bytes() % SHARED_ALIGNMENT == 0);
  REQUIRE(room.slot(0) == uint32_t(room.panels * room.groups * 64 * 128) && room.slot(1) - room.slot(0) == uint32_t(room.tile * 128));
  REQUIRE(room.full(0) == room.slot(room.stages) && room.empty(0) == room.full(0) + 8 * room.stages);
  REQUIRE(room.queries_ready() == room.empty(0) + 8 * room.stages && room.queries_ready() % 8 == 0);
  REQUIRE(room.queries_ready() + 8 + 1024 == room.bytes());
}

void check_plan(int images, int pixels, int queries, int channels, int processors) {
  const Plan plan = make_plan(images, pixels, queries, channels, processors);
  const auto [tiles, query_blocks, splits] = plan.grid;
  check_room(plan.room);
  REQUIRE(query_blocks * plan.room.queries() >= queries && (query_blocks - 1) * plan.room.queries() < queries);
  REQUIRE(int64_t(tiles) * plan.room.tile >= pixels && int64_t(tiles - 1) * plan.room.tile < pixels);
  REQUIRE(plan.grid.first_tile(0) == 0 && plan.grid.first_tile(splits) == tiles);
  for (int split = 0; split < splits; ++split) REQUIRE(plan.grid.first_tile(split) < plan.grid.first_tile(split + 1));
  // large maps keep all multiprocessors busy most of the time
  const int64_t blocks = int64_t(images) * query_blocks * splits, waves = (blocks + processors - 1) / processors;
  if (tiles >= 8 * processors) REQUIRE(double(images) * query_blocks * tiles > 0.75 * processors * waves * divide_up(tiles, splits));
}

}  // namespace

int main(int, char** arguments) {
  std::mt19937 random(unsigned(std::atoi(arguments[1])));
  check_keys(random);
  check_bits(random);
  check_descriptors();
  for (int eights : {4, 8, 16}) check_accumulators(eights);
  for (int channels : {64, 128, 192, 256})
    for (int i = 0; i < 2000; ++i)
      check_plan(1 + random() % 32, 1 + random() % (1u << random() % 20), 1 + random() % 300, channels, 1 + random() % 200);
  check_plan(1, NOWHERE, 100, 256, 132);
}
