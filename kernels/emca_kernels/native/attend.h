// The whole layer with one head, in three parallel regions: queries are projected and folded; pixels are chosen or pooled; prototypes are
// projected and attended to. The first and the last are shared by groups of queries, so that nobody waits inside of them.
#pragma once
#include <tuple>

#include "call.h"
#include "pool.h"
#include "select.h"

namespace emca {
namespace {

// A matrix as products take it: in place where it can be, else copied to floats.
class Matrix {
 public:
  Matrix(const Kernels& isa, const Tensor& tensor) : columns_(int(tensor.size(1))) {
    const int rows = int(tensor.size(0));
    if (tensor.scalar_type() == ScalarType::Float && (tensor.stride(0) == 1 || tensor.stride(1) == 1)) {
      weight_ = {static_cast<const float*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), rows};
      return;
    }
    copy_ = Floats(int64_t(rows) * columns_);
    isa.load({tensor.const_data_ptr(), type_of(tensor), tensor.stride(0), tensor.stride(1)}, nullptr, 0, rows, columns_, copy_.data());
    weight_ = {copy_.data(), columns_, 1, rows};
  }
  const Weight& weight() const { return weight_; }
  Weight transposed() const { return {weight_.data, weight_.column_stride, weight_.row_stride, columns_}; }

 private:
  int columns_;
  Floats copy_;
  Weight weight_{};
};

Floats floats_of(const Kernels& isa, const Tensor& vector) {
  const int64_t count = vector.numel(), stride = vector.dim() ? vector.stride(0) : 1;
  Floats floats(count);
  isa.load({vector.const_data_ptr(), type_of(vector), 0, stride}, nullptr, 0, 1, int(count), floats.data());
  return floats;
}

// Parameters in the order of `Projections`.
enum Parameter { QUERY_WEIGHT, QUERY_BIAS, KEY_WEIGHT, KEY_BIAS, PRODUCT_WEIGHT, PRODUCT_BIAS, ALPHA, OUT_WEIGHT, OUT_BIAS };

// Groups [first, first + count) of the queries of an image, as vectors.
struct Groups {
  int64_t image, first, count;

  int64_t size(int64_t channels) const { return count * GROUP * channels; }
  Packed vectors(const Call& call, const float* packed, int64_t channels) const {
    return {packed, int(count * GROUP / call.isa.width), int(channels)};
  }
};

// Splits all groups of a call among threads.
template <class Step>
void over_groups(const Call& call, const Step& step) {
  parallel_for(0, call.images * call.groups, 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t image = begin / call.groups, first = begin % call.groups;
      const Groups groups{image, first, std::min(end - begin, call.groups - first)};
      step(groups);
      begin += groups.count;
    }
  });
}

class Layer {
 public:
  Layer(Call& call, const Tensor& queries, const std::optional<Tensor>& query_position, const std::vector<Tensor>& parameters,
        bool raw_residual)
      : call_(call), isa_(call.isa), queries_(queries), query_position_(query_position), parameters_(parameters), raw_(raw_residual),
        keys_(parameters[QUERY_WEIGHT].size(0)), projected_(call.images * call.lanes * keys_),
        query_bias_(floats_of(isa_, parameters[QUERY_BIAS])), key_bias_(floats_of(isa_, parameters[KEY_BIAS])),
        product_bias_(floats_of(isa_, parameters[PRODUCT_BIAS])), alpha_(floats_of(isa_, parameters[ALPHA])),
        out_bias_(floats_of(isa_, parameters[OUT_BIAS])) {}

  // Projects all queries, and packs masks. `folds`: they are folded into what scores pixels, times `scale`.
  void project(bool folds, float scale) {
    if (folds) call_.make_room_for_queries();
    over_groups(call_, [&](const Groups& groups) {
      const Floats located = pack(groups, query_position_ ? &*query_position_ : nullptr);
      isa_.project(matrix(QUERY_WEIGHT).weight(), groups.vectors(call_, located.data(), call_.channels), query_bias_.data(),
                   projected(groups));
      if (folds) {
        float* folded = call_.packed_of(groups.image, groups.first);
        isa_.project(matrix(KEY_WEIGHT).transposed(), groups.vectors(call_, projected(groups), keys_), nullptr, folded);
        if (scale != 1.f) isa_.scale(folded, scale, groups.size(call_.channels));
        call_.pair_groups(groups.image, groups.first, groups.count);
      }
      for (int64_t group = groups.first; group < groups.first + groups.count; ++group) call_.allow_group(groups.image, group);
    });
  }

  // Attends to a prototype [channels] per query, which `prototype(image, query, to)` writes. rows and updated: [B, Q, channels].
  template <class Prototype>
  void attend(const Prototype& prototype, float* rows, float* updated) const {
    over_groups(call_, [&](const Groups& groups) {
      const int64_t channels = call_.channels;
      for (int64_t query = groups.first * GROUP; query < std::min(call_.asked, (groups.first + groups.count) * GROUP); ++query)
        prototype(groups.image, query, rows + (groups.image * call_.asked + query) * channels);
      const Floats gathered(groups.size(channels)), keys(groups.size(keys_)), pairs(groups.size(keys_)), product(groups.size(keys_));
      for (int64_t at = 0; at < groups.count; ++at) {
        const float* from = rows + (groups.image * call_.asked + (groups.first + at) * GROUP) * channels;
        isa_.pack({from, Type::float32, channels, 1}, nullptr, call_.group_count(groups.first + at), int(channels),
                  gathered.data() + at * GROUP * channels);
      }
      isa_.project(matrix(KEY_WEIGHT).weight(), groups.vectors(call_, gathered.data(), channels), key_bias_.data(), keys.data());
      isa_.multiply(projected(groups), keys.data(), groups.size(keys_), pairs.data());
      isa_.project(matrix(PRODUCT_WEIGHT).weight(), groups.vectors(call_, pairs.data(), keys_), product_bias_.data(), product.data());
      isa_.reweigh(alpha_.data(), groups.vectors(call_, keys.data(), keys_), product.data());
      const Floats& out = gathered;
      isa_.project(matrix(OUT_WEIGHT).weight(), groups.vectors(call_, product.data(), keys_), out_bias_.data(), out.data());
      isa_.add(out.data(), raw_ ? pack(groups, nullptr).data() : projected(groups), groups.size(channels));
      for (int64_t at = 0; at < groups.count; ++at) {
        float* to = updated + (groups.image * call_.asked + (groups.first + at) * GROUP) * channels;
        isa_.unpack(out.data() + at * GROUP * channels, call_.group_count(groups.first + at), int(channels), to);
      }
    });
  }

 private:
  Matrix matrix(Parameter which) const { return Matrix(isa_, parameters_[which]); }
  float* projected(const Groups& groups) const { return projected_.data() + (groups.image * call_.lanes + groups.first * GROUP) * keys_; }

  // Queries as they came, plus their positions where there are any.
  Floats pack(const Groups& groups, const Tensor* position) const {
    Floats packed(groups.size(call_.channels));
    for (int64_t at = 0; at < groups.count; ++at) {
      const int64_t group = groups.first + at;
      const auto rows = [&](const Tensor& tensor) {
        Rows found = rows_of(tensor, groups.image, 0);
        found.data = static_cast<const char*>(found.data) + group * GROUP * found.pixel_stride * int64_t(tensor.element_size());
        return found;
      };
      const Rows place = position ? rows(*position) : Rows{};
      isa_.pack(rows(queries_), position ? &place : nullptr, call_.group_count(group), int(call_.channels),
                packed.data() + at * GROUP * call_.channels);
    }
    return packed;
  }

  Call& call_;
  const Kernels& isa_;
  const Tensor& queries_;
  const std::optional<Tensor>& query_position_;
  const std::vector<Tensor>& parameters_;
  bool raw_;
  int64_t keys_;
  Floats projected_, query_bias_, key_bias_, product_bias_, alpha_, out_bias_;
};

// updated queries and prototypes float32 [B, Q, C], and the chosen pixels int64 [B, Q] or logs of sums of exponentials float32 [B, Q]
std::tuple<Tensor, Tensor, Tensor> emca_attention(Tensor features, Tensor queries, std::optional<Tensor> allowed,
                                                  std::optional<Tensor> position, std::optional<Tensor> query_position,
                                                  std::vector<Tensor> parameters, std::optional<Tensor> scale, std::string selection,
                                                  std::string residual) {
  Call call(features, allowed, position, queries.size(1), 1);
  Layer layer(call, queries, query_position, parameters, residual == "raw");
  layer.project(selection != "mean", scale ? floats_of(call.isa, *scale)[0] : 1.f);
  const auto result = [&](ScalarType type, std::initializer_list<int64_t> shape) { return torch::stable::new_empty(queries, shape, type); };
  Tensor updated = result(ScalarType::Float, {call.images, call.asked, call.channels});
  Tensor rows = result(ScalarType::Float, {call.images, call.asked, call.channels});
  Tensor kept = result(selection == "argmax" ? ScalarType::Long : ScalarType::Float, {call.images, call.asked});
  auto *updated_out = static_cast<float*>(updated.mutable_data_ptr()), *rows_out = static_cast<float*>(rows.mutable_data_ptr());
  if (selection == "argmax") {
    const std::vector<Best> best = best_pixels(call);
    auto* chosen = static_cast<int64_t*>(kept.mutable_data_ptr());
    layer.attend(
        [&](int64_t image, int64_t query, float* to) {
          const int64_t pixel = chosen[image * call.asked + query] = best[image].pixel(query);
          const Rows content = rows_of(features, image, 0), place = position ? rows_of(*position, image, 0) : Rows{};
          call.isa.load(content, position ? &place : nullptr, pixel, 1, int(call.channels), to);
        },
        rows_out, updated_out);
  } else {
    const Pools pools(call, selection == "softmax");
    auto* logsumexp = static_cast<float*>(kept.mutable_data_ptr());
    layer.attend([&](int64_t image, int64_t query,
                     float* to) { logsumexp[image * call.asked + query] = pools.mean(image, query, to); },
                 rows_out, updated_out);
  }
  return {updated, rows, kept};
}

}  // namespace
}  // namespace emca
