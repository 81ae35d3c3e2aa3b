// A call on one instruction set: its sizes, its queries in vectors, its mask in bits, and how tiles of pixels are shared among threads.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "host.h"

namespace emca {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for, torch::stable::Tensor;

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// One head of one image of a tensor [B, N, C].
Rows rows_of(const Tensor& tensor, int64_t image, int64_t first_channel) {
  const int64_t offset = image * tensor.stride(0) + first_channel * tensor.stride(2);
  return {static_cast<const char*>(tensor.const_data_ptr()) + offset * int64_t(tensor.element_size()), type_of(tensor), tensor.stride(1),
          tensor.stride(2)};
}

// Memory that starts on a cache line, since a load that straddles two costs twice; not written beforehand.
template <class T>
class Room {
 public:
  Room() = default;
  explicit Room(int64_t count) : data_(static_cast<T*>(::operator new(count * sizeof(T), LINE))) {}
  T* data() const { return data_.get(); }
  T& operator[](int64_t at) const { return data_.get()[at]; }

 private:
  static constexpr std::align_val_t LINE{64};
  struct Delete {
    void operator()(T* data) const { ::operator delete(data, LINE); }
  };
  std::unique_ptr<T, Delete> data_;
};

using Floats = Room<float>;

constexpr int64_t GROUP = 16;  // queries of a word of allowed bits

struct Call {
  const Kernels& isa;
  const Tensor& features;
  const std::optional<Tensor>& allowed;
  const std::optional<Tensor>& position;
  int64_t images, pixels, asked, heads, channels, groups, lanes, vectors, tile_pixels;
  // whether scores are products of bfloat16
  bool pairs;
  // queries of each problem, an image and a head: [problems][vectors][channels][width], and the same as bfloat16 pairs
  Floats packed, paired;
  Room<uint16_t> allowed_bits;

  Call(const Tensor& features_, const std::optional<Tensor>& allowed_, const std::optional<Tensor>& position_, int64_t asked_,
       int64_t heads_)
      : isa(EMCA_SERVING(kernels)), features(features_), allowed(allowed_), position(position_), images(features.size(0)), pixels(features.size(1)),
        asked(asked_), heads(heads_), channels(features.size(2) / heads_), groups((asked + GROUP - 1) / GROUP), lanes(groups * GROUP),
        vectors(lanes / isa.width) {
    // a tile of floats stays in the second-level cache, small maps give every thread one; multiples of the kernels' blocks of rows
    const int64_t largest = std::max<int64_t>(1, 24576 / channels / 24), wanted = (pixels / 8 + 23) / 24;
    tile_pixels = 24 * std::clamp<int64_t>(wanted, 1, largest);
    pairs = isa.pair && features.scalar_type() == ScalarType::BFloat16 && channels % 2 == 0 && features.stride(2) == 1 &&
            (!position || position->stride(2) == 1);
    if (allowed) allowed_bits = Room<uint16_t>(images * groups * pixels);
  }

  int64_t problems() const { return images * heads; }
  int64_t tiles() const { return (pixels + tile_pixels - 1) / tile_pixels; }
  int64_t packed_size() const { return lanes * channels; }
  // Queries of a group that exist.
  int group_count(int64_t group) const { return int(std::min(GROUP, asked - group * GROUP)); }
  // Queries [problems][lanes] of floats, and of what products take.
  void make_room_for_queries() {
    packed = Floats(problems() * packed_size());
    if (pairs) paired = Floats(problems() * packed_size() / 2);
  }
  float* packed_of(int64_t problem, int64_t group) const { return packed.data() + problem * packed_size() + group * GROUP * channels; }

  // After the queries of some groups have been packed.
  void pair_groups(int64_t problem, int64_t group, int64_t count) const {
    if (!pairs) return;
    const int64_t first = problem * packed_size() + group * GROUP * channels;
    isa.pair(packed.data() + first, int(count * GROUP), int(channels), paired.data() + first / 2);
  }

  // Bits of what a group of queries allows, words [images][groups][pixels]. A query that allows nothing allows everything.
  void allow_group(int64_t image, int64_t group) const {
    if (!allowed) return;
    const auto* rows = static_cast<const uint8_t*>(allowed->const_data_ptr()) + image * allowed->stride(0) + group * GROUP * allowed->stride(1);
    isa.allow(rows, allowed->stride(1), group_count(group), pixels, allowed_bits.data() + (image * groups + group) * pixels);
  }

  // Queries as a tile's products take them, and as floats.
  Packed queries_of(int64_t problem) const {
    const float* own = pairs ? paired.data() + problem * packed_size() / 2 : packed.data() + problem * packed_size();
    return {own, int(vectors), int(channels)};
  }
  Packed float_queries_of(int64_t problem) const { return {packed.data() + problem * packed_size(), int(vectors), int(channels)}; }

  // Pixels of a tile as floats, in `room` unless they are that already.
  Tile float_tile(int64_t problem, int64_t number, const Floats& room) const {
    Tile tile = place(problem, number);
    const Rows rows = rows_of(features, problem / heads, problem % heads * channels);
    if (!position && rows.type == Type::float32 && rows.channel_stride == 1) {
      tile.data = static_cast<const float*>(rows.data) + tile.first * rows.pixel_stride;
      tile.stride = rows.pixel_stride;
      return tile;
    }
    const std::optional<Rows> located = position_of(problem);
    isa.load(rows, located ? &*located : nullptr, tile.first, tile.count, int(channels), room.data());
    tile.data = room.data();
    tile.stride = channels;
    return tile;
  }

  // Pixels of a tile as products take them.
  Tile tile(int64_t problem, int64_t number, const Floats& room) const {
    if (!pairs) return float_tile(problem, number, room);
    Tile tile = place(problem, number);
    const Rows rows = rows_of(features, problem / heads, problem % heads * channels);
    tile.type = Type::bfloat16;
    tile.data = static_cast<const uint16_t*>(rows.data) + tile.first * rows.pixel_stride;
    tile.stride = rows.pixel_stride;
    if (const std::optional<Rows> located = position_of(problem)) {
      tile.position = static_cast<const uint16_t*>(located->data) + tile.first * located->pixel_stride;
      tile.position_stride = located->pixel_stride;
    }
    return tile;
  }

  // Room that a tile may need.
  Floats tile_room() const { return Floats(tile_pixels * channels); }

 private:
  Tile place(int64_t problem, int64_t number) const {
    const int64_t first = number * tile_pixels;
    const uint16_t* bits = allowed ? allowed_bits.data() + problem / heads * groups * pixels + first : nullptr;
    return {nullptr, Type::float32, 0, first, int(std::min(tile_pixels, pixels - first)), bits, pixels};
  }
  std::optional<Rows> position_of(int64_t problem) const {
    if (!position) return std::nullopt;
    return rows_of(*position, problem / heads, problem % heads * channels);
  }
};

// Packs queries [B, Q, heads * channels] and the mask of a call.
void prepare(Call& call, const std::optional<Tensor>& queries) {
  if (queries) call.make_room_for_queries();
  // some 50 microseconds of work are worth a thread
  const int64_t grain = std::max<int64_t>(1, (1 << 20) / std::max<int64_t>(1, GROUP * (call.pixels / 4 + 4 * call.channels * call.heads)));
  parallel_for(0, call.images * call.groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t image = at / call.groups, group = at % call.groups;
      call.allow_group(image, group);
      for (int64_t head = 0; queries && head < call.heads; ++head) {
        Rows rows = rows_of(*queries, image, head * call.channels);
        rows.data = static_cast<const char*>(rows.data) + group * GROUP * rows.pixel_stride * int64_t(queries->element_size());
        const int64_t problem = image * call.heads + head;
        call.isa.pack(rows, nullptr, call.group_count(group), int(call.channels), call.packed_of(problem, group));
        call.pair_groups(problem, group, 1);
      }
    }
  });
}

}  // namespace
}  // namespace emca
