// Runs one call on the machine of host threads. Reads sizes and tensors from stdin, writes indices int64 [B, Q] and scores float32 [B, Q].
#include "machine.h"

#include "kernels.cuh"

namespace {

using namespace emca::cuda;

struct Sizes {
  int32_t number, images, pixels, queries, channels, row_stride, position_images, mask, processors, late, seed;
};

template <class T>
std::vector<T> read(size_t count) {
  std::vector<T> values(count);
  machine::require(std::fread(values.data(), sizeof(T), count, stdin) == count, "the input ends early");
  return values;
}

TensorMap map_of(const Rows& rows, int box_rows) {
  return {static_cast<const uint16_t*>(rows.data), rows.step() ? rows.images : 1, rows.rows, rows.channels, rows.image_stride, rows.row_stride,
          box_rows};
}

template <Number NUMBER, int TILE, emca::cuda::Mask MASK>
void run_splits(const Call& call, unsigned seed) {
  const Room& room = call.plan.room;
  const Problem problem = make_problem(call);
  const TensorMap features = map_of(call.features, TILE), queries = map_of(call.queries, room.queries());
  const TensorMap position = map_of(call.position.data ? call.position : call.features, TILE);
  const Place3 grid{unsigned(call.plan.grid.splits), unsigned(call.plan.grid.query_blocks), unsigned(call.features.images)};
  machine::run(grid, room.threads(), seed, [&] { best_of_splits<NUMBER, TILE, MASK>(features, position, queries, problem); });
}

template <Number NUMBER, emca::cuda::Mask MASK>
void run_tile(const Call& call, unsigned seed) {
  const int tile = call.plan.room.tile;
  (tile == 32 ? run_splits<NUMBER, 32, MASK> : tile == 64 ? run_splits<NUMBER, 64, MASK> : run_splits<NUMBER, 128, MASK>)(call, seed);
}

template <Number NUMBER>
void run(const Call& call, unsigned seed) {
  using enum emca::cuda::Mask;
  const auto kind = call.allowed.kind;
  (kind == none ? run_tile<NUMBER, none> : kind == bytes ? run_tile<NUMBER, bytes> : run_tile<NUMBER, words>)(call, seed);
  const int64_t count = int64_t(call.features.images) * call.queries.rows;
  machine::run({merge_blocks(count), 1, 1}, MERGE_THREADS, seed,
               [&] { best_of_all<NUMBER>(call.keys, count, call.plan.grid.splits, call.indices, call.scores); });
}

}  // namespace

int main() {
  const auto [number, images, pixels, asked, channels, row_stride, position_images, mask, processors, late, seed] = read<Sizes>(1)[0];
  machine::late = late;
  const auto features = read<uint16_t>(size_t(images) * pixels * row_stride), queries = read<uint16_t>(size_t(images) * asked * channels);
  const auto position = read<uint16_t>(size_t(position_images) * pixels * channels);
  const int row = mask == 1 ? pixels : mask == 2 ? divide_up(pixels, 32) : 0;
  const auto allowed = read<uint8_t>(size_t(images) * asked * row * (mask == 2 ? 4 : 1));
  Call call;
  call.number = Number(number);
  call.features = {features.data(), images, pixels, channels, int64_t(pixels) * row_stride, row_stride};
  call.queries = {queries.data(), images, asked, channels, int64_t(asked) * channels, channels};
  if (position_images)
    call.position = {position.data(), images, pixels, channels, position_images > 1 ? int64_t(pixels) * channels : 0, channels};
  call.allowed = {emca::cuda::Mask(mask), allowed.data(), int64_t(asked) * row, row};
  call.plan = make_plan(images, pixels, asked, channels, processors);
  const size_t count = size_t(images) * asked;
  std::vector<uint64_t> keys(count * call.plan.grid.splits, ~0ull);
  std::vector<int64_t> indices(count, -1);
  std::vector<float> scores(count, std::numeric_limits<float>::quiet_NaN());
  call.keys = keys.data();
  call.indices = indices.data();
  call.scores = scores.data();
  (number ? run<Number::float16> : run<Number::bfloat16>)(call, unsigned(seed));
  std::fwrite(indices.data(), 8, count, stdout);
  std::fwrite(scores.data(), 4, count, stdout);
}
