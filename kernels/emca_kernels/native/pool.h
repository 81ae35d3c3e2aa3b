// Soft prototypes: a softmax-weighted or plain mean of each query's pixels.
#pragma once
#include <cmath>
#include <tuple>

#include "call.h"

namespace emca {
namespace {

// Partial sums of one part of the pixels of a problem.
struct Part {
  Floats maximum, total, sum;

  explicit Part(const Call& call) : maximum(call.lanes), total(call.lanes), sum(call.packed_size()) {
    std::fill_n(maximum.data(), call.lanes, -INFINITE);
    std::fill_n(total.data(), call.lanes, 0.f);
    std::fill_n(sum.data(), call.packed_size(), 0.f);
  }
  Pool pool() const { return {maximum.data(), total.data(), sum.data()}; }
};

// Pools of all problems. Pixels are cut into parts by their number alone, and parts are added in order: threads do not change a bit.
class Pools {
 public:
  // `soft` weighs by the call's queries, else all allowed pixels count alike
  Pools(const Call& call, bool soft) : call_(call), soft_(soft), each_((call.tiles() + MOST_PARTS - 1) / MOST_PARTS),
                                       parts_((call.tiles() + each_ - 1) / each_) {
    for (int64_t part = 0; part < call.problems() * parts_; ++part) all_.emplace_back();
    parallel_for(0, call.problems() * parts_, 1, [&](int64_t begin, int64_t end) {
      const Floats room = call.tile_room(), scores(call.tile_pixels * call.lanes), weights((call.tile_pixels + 1) * call.lanes);
      for (int64_t at = begin; at < end; ++at) {
        all_[at].emplace(call);
        const int64_t problem = at / parts_, first = at % parts_ * each_;
        for (int64_t number = first; number < std::min(call.tiles(), first + each_); ++number) {
          const Tile tile = call.float_tile(problem, number, room);
          if (soft) call.isa.scores(tile, call.float_queries_of(problem), scores.data());
          call.isa.pool(tile, int(call.lanes), int(call.channels), soft ? scores.data() : nullptr, weights.data(), all_[at]->pool());
        }
      }
    });
  }

  // Writes the mean [channels] of a query, and returns the log of its sum of exponentials (0 where weights are equal).
  float mean(int64_t problem, int64_t query, float* to) const {
    const auto own = [&](int64_t part) -> const Part& { return *all_[problem * parts_ + part]; };
    float maximum = soft_ ? -INFINITE : 0.f, total = 0;
    for (int64_t part = 0; soft_ && part < parts_; ++part) maximum = std::max(maximum, own(part).maximum[query]);
    std::fill_n(to, call_.channels, 0.f);
    for (int64_t part = 0; part < parts_; ++part) {
      const float factor = soft_ ? std::exp(own(part).maximum[query] - maximum) : 1.f;
      total += factor * own(part).total[query];
      const float* sum = own(part).sum.data() + query * call_.channels;
      for (int64_t c = 0; c < call_.channels; ++c) to[c] += factor * sum[c];
    }
    for (int64_t c = 0; c < call_.channels; ++c) to[c] /= total;
    return soft_ ? maximum + std::log(total) : 0.f;
  }

 private:
  static constexpr int64_t MOST_PARTS = 16;
  const Call& call_;
  bool soft_;
  int64_t each_, parts_;
  std::vector<std::optional<Part>> all_;
};

// pooled float32 [B, Q, M, C / M] and log of the sum of exponentials float32 [B, Q, M] (0 where weights are equal)
std::tuple<Tensor, Tensor> pool_prototypes(Tensor features, std::optional<Tensor> queries, std::optional<Tensor> allowed,
                                           std::optional<Tensor> position, int64_t heads) {
  Call call(features, allowed, position, queries ? queries->size(1) : allowed->size(1), heads);
  prepare(call, queries);
  Tensor pooled = torch::stable::new_empty(features, {call.images, call.asked, heads, call.channels}, ScalarType::Float);
  Tensor logsumexp = torch::stable::new_empty(features, {call.images, call.asked, heads}, ScalarType::Float);
  auto* pooled_out = static_cast<float*>(pooled.mutable_data_ptr());
  auto* logsumexp_out = static_cast<float*>(logsumexp.mutable_data_ptr());
  const Pools pools(call, queries.has_value());
  parallel_for(0, call.problems() * call.asked, 64, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t problem = at / call.asked, query = at % call.asked;
      const int64_t to = (problem / heads * call.asked + query) * heads + problem % heads;
      logsumexp_out[to] = pools.mean(problem, query, pooled_out + to * call.channels);
    }
  });
  return {pooled, logsumexp};
}

}  // namespace
}  // namespace emca
