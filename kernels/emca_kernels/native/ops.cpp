// The operators: what is split over threads, and the boundary to torch (its stable interface only).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "host.h"

namespace {

using emca::Buffer, emca::Kernels, emca::Packed, emca::Pool, emca::Rows, emca::Tile, emca::Type, emca::type_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr int32_t NOWHERE = std::numeric_limits<int32_t>::max();

const Kernels& kernels() { return EMCA_SERVING(kernels); }

// One head of one image of a tensor [B, N, C].
Rows rows_of(const Tensor& tensor, int64_t image, int64_t first_channel) {
  const int64_t offset = image * tensor.stride(0) + first_channel * tensor.stride(2);
  return {static_cast<const char*>(tensor.const_data_ptr()) + offset * int64_t(tensor.element_size()), type_of(tensor), tensor.stride(1),
          tensor.stride(2)};
}

// What is asked for: sizes, tensors, queries packed once per problem (an image and a head), and which queries allow nothing.
struct Call {
  const Tensor& features;
  const std::optional<Tensor>& queries;
  const std::optional<Tensor>& allowed;
  const std::optional<Tensor>& position;
  int64_t images, pixels, asked, heads, channels, vectors, lanes, tile_pixels;
  Buffer packed;
  std::vector<uint16_t> allowed_bits;

  Call(const Tensor& features_, const std::optional<Tensor>& queries_, const std::optional<Tensor>& allowed_,
       const std::optional<Tensor>& position_, int64_t asked_, int64_t heads_)
      : features(features_), queries(queries_), allowed(allowed_), position(position_), images(features.size(0)), pixels(features.size(1)),
        asked(asked_), heads(heads_), channels(features.size(2) / heads_) {
    const int64_t width = kernels().width;
    // a multiple of 16, so that words of allowed bits and blocks of rows never straddle the end
    lanes = (asked + 15) / 16 * 16;
    vectors = lanes / width;
    // a tile of floats stays in the second-level cache, small maps give every thread one; multiples of the kernels' blocks of rows
    const int64_t largest = std::max<int64_t>(1, 24576 / channels / 24), wanted = (pixels / 8 + 23) / 24;
    tile_pixels = 24 * std::clamp<int64_t>(wanted, 1, largest);
    if (queries) pack_queries();
    if (allowed) pack_allowed();
  }

  int64_t problems() const { return images * heads; }
  int64_t tiles() const { return (pixels + tile_pixels - 1) / tile_pixels; }
  // fewer multiply-adds than this are not worth another thread
  int64_t grain() const { return std::max<int64_t>(1, (1 << 20) / std::max<int64_t>(1, tile_pixels * lanes * channels)); }

  void pack_queries() {
    const int64_t each = lanes * channels;
    packed.resize(problems() * each);
    torch::stable::parallel_for(0, problems(), 4, [&](int64_t begin, int64_t end) {
      for (int64_t problem = begin; problem < end; ++problem) {
        std::fill_n(packed.data() + problem * each, each, 0.f);
        kernels().pack(rows_of(*queries, problem / heads, problem % heads * channels), asked, channels, packed.data() + problem * each);
      }
    });
  }

  // Bits of what is allowed, words [B][lanes / 16][P]. A query that allows nothing allows everything.
  void pack_allowed() {
    const int64_t groups = lanes / 16;
    allowed_bits.assign(images * groups * pixels, 0);
    torch::stable::parallel_for(0, images * groups, std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, 16 * pixels)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t at = begin; at < end; ++at) {
                                    const int64_t first = at % groups * 16;
                                    for (int64_t query = first; query < std::min(asked, first + 16); ++query)
                                      add_bits(at / groups, query, int(query - first), allowed_bits.data() + at * pixels);
                                  }
                                });
  }

  void add_bits(int64_t image, int64_t query, int shift, uint16_t* words) const {
    const auto* row = static_cast<const uint8_t*>(allowed->const_data_ptr()) + image * allowed->stride(0) + query * allowed->stride(1);
    const uint8_t everything = !std::memchr(row, 1, pixels);
    for (int64_t p = 0; p < pixels; ++p) words[p] |= uint16_t((row[p] | everything) << shift);
  }

  Packed queries_of(int64_t problem) const { return {packed.data() + problem * lanes * channels, int(vectors), int(channels)}; }
};

// Room of one thread for a tile.
struct Room {
  Buffer floats, scores, weights;

  explicit Room(const Call& call)
      : floats(call.tile_pixels * call.channels), scores(call.tile_pixels * call.lanes), weights((call.tile_pixels + 1) * call.lanes) {}

  Tile tile(const Call& call, int64_t problem, int64_t number) {
    const int64_t image = problem / call.heads, channel = problem % call.heads * call.channels;
    const int64_t first = number * call.tile_pixels;
    const int count = int(std::min(call.tile_pixels, call.pixels - first));
    const uint16_t* allowed = call.allowed ? call.allowed_bits.data() + image * call.lanes / 16 * call.pixels + first : nullptr;
    const Rows rows = rows_of(call.features, image, channel);
    if (!call.position && rows.type == Type::float32 && rows.channel_stride == 1)
      return {static_cast<const float*>(rows.data) + first * rows.pixel_stride, rows.pixel_stride, first, count, allowed,
              call.pixels};
    const Rows position = call.position ? rows_of(*call.position, image, channel) : Rows{};
    kernels().load(rows, call.position ? &position : nullptr, first, count, int(call.channels), floats.data());
    return {floats.data(), call.channels, first, count, allowed, call.pixels};
  }
};

// Runs `step(problem, tile number)` over all tiles in threads; `begin(problem)` before the first and `end(problem)` after the last tile of a
// thread's part of a problem.
template <class Worker>
void over_tiles(const Call& call, const Worker& make) {
  const int64_t tiles = call.tiles();
  torch::stable::parallel_for(0, call.problems() * tiles, call.grain(), [&](int64_t begin, int64_t end) {
    auto worker = make();
    for (int64_t at = begin; at < end;) {
      const int64_t problem = at / tiles, last = std::min(end, (problem + 1) * tiles);
      worker.begin(problem);
      for (; at < last; ++at) worker.step(problem, at % tiles);
      worker.end(problem);
    }
  });
}

// The best pixel per lane so far. Its order is total, so that merging in any order gives the same.
struct Best {
  Buffer score;
  std::vector<int32_t> index;

  void clear(int64_t lanes) {
    score.assign(lanes, -INFINITE);
    index.assign(lanes, NOWHERE);
  }
};

struct SelectBest {
  const Call& call;
  std::vector<Best>& all;
  std::mutex& merging;
  Room room{call};
  Best mine{};

  void begin(int64_t) { mine.clear(call.lanes); }
  void step(int64_t problem, int64_t number) {
    kernels().best(room.tile(call, problem, number), call.queries_of(problem), mine.score.data(), mine.index.data());
  }
  void end(int64_t problem) {
    std::lock_guard lock(merging);
    Best& best = all[problem];
    for (int64_t lane = 0; lane < call.lanes; ++lane)
      if (mine.score[lane] > best.score[lane] || (mine.score[lane] == best.score[lane] && mine.index[lane] < best.index[lane])) {
        best.score[lane] = mine.score[lane];
        best.index[lane] = mine.index[lane];
      }
  }
};

struct Candidate {
  float score;
  int32_t index;
};

inline bool before(const Candidate& one, const Candidate& other) {
  return one.score > other.score || (one.score == other.score && one.index < other.index);
}

// The k best pixels of each query, sorted.
struct TopList {
  int64_t k;
  std::vector<Candidate> list;

  TopList(int64_t k_, int64_t asked) : k(k_), list(k_ * asked) { clear(); }
  void clear() { std::fill(list.begin(), list.end(), Candidate{-INFINITE, NOWHERE}); }
  void offer(int64_t query, Candidate candidate) {
    Candidate* slots = list.data() + query * k;
    if (!before(candidate, slots[k - 1])) return;
    int64_t at = k - 1;
    for (; at > 0 && before(candidate, slots[at - 1]); --at) slots[at] = slots[at - 1];
    slots[at] = candidate;
  }
};

struct SelectTop {
  const Call& call;
  std::vector<TopList>& all;
  std::mutex& merging;
  TopList mine;
  Room room{call};

  void begin(int64_t) { mine.clear(); }
  void step(int64_t problem, int64_t number) {
    const Tile tile = room.tile(call, problem, number);
    kernels().scores(tile, call.queries_of(problem), room.scores.data());
    for (int p = 0; p < tile.count; ++p)
      for (int64_t query = 0; query < call.asked; ++query) {
        const float score = room.scores[p * call.lanes + query];
        if (score > -INFINITE) mine.offer(query, {score, int32_t(tile.first + p)});
      }
  }
  void end(int64_t problem) {
    std::lock_guard lock(merging);
    for (int64_t query = 0; query < call.asked; ++query)
      for (int64_t slot = 0; slot < mine.k; ++slot) all[problem].offer(query, mine.list[query * mine.k + slot]);
  }
};

// indices int64 [B, Q, M, k] and scores float32 [B, Q, M, k]
std::tuple<Tensor, Tensor> select_prototypes(Tensor features, Tensor queries, std::optional<Tensor> allowed, std::optional<Tensor> position,
                                             int64_t k, int64_t heads) {
  const std::optional<Tensor> given = queries;
  const Call call(features, given, allowed, position, queries.size(1), heads);
  Tensor indices = torch::stable::new_empty(queries, {call.images, call.asked, heads, k}, ScalarType::Long);
  Tensor scores = torch::stable::new_empty(queries, {call.images, call.asked, heads, k}, ScalarType::Float);
  auto* index_out = static_cast<int64_t*>(indices.mutable_data_ptr());
  auto* score_out = static_cast<float*>(scores.mutable_data_ptr());
  const auto write = [&](int64_t problem, int64_t query, int64_t slot, Candidate found) {
    const int64_t at = ((problem / heads * call.asked + query) * heads + problem % heads) * k + slot;
    index_out[at] = found.index;
    score_out[at] = found.score;
  };
  std::mutex merging;
  if (k == 1) {
    std::vector<Best> all(call.problems());
    for (Best& best : all) best.clear(call.lanes);
    over_tiles(call, [&] { return SelectBest{call, all, merging}; });
    for (int64_t problem = 0; problem < call.problems(); ++problem)
      for (int64_t query = 0; query < call.asked; ++query) {
        const Best& best = all[problem];
        write(problem, query, 0, {best.score[query], best.index[query] == NOWHERE ? 0 : best.index[query]});
      }
  } else {
    std::vector<TopList> all(call.problems(), TopList(k, call.asked));
    over_tiles(call, [&] { return SelectTop{call, all, merging, TopList(k, call.asked)}; });
    for (int64_t problem = 0; problem < call.problems(); ++problem)
      for (int64_t query = 0; query < call.asked; ++query) {
        const Candidate* found = all[problem].list.data() + query * k;
        const int32_t first = found[0].index == NOWHERE ? 0 : found[0].index;
        for (int64_t slot = 0; slot < k; ++slot)
          write(problem, query, slot, {found[slot].score, found[slot].index == NOWHERE ? first : found[slot].index});
      }
  }
  return {indices, scores};
}

// Partial sums of one part of the pixels of a problem.
struct Part {
  Buffer maximum, total, sum;

  explicit Part(const Call& call) : maximum(call.lanes, -INFINITE), total(call.lanes, 0.f), sum(call.lanes * call.channels, 0.f) {}
  Pool pool() { return {maximum.data(), total.data(), sum.data()}; }
};

// Pixels are cut into parts by their number alone, and parts are added in order: threads do not change a bit.
constexpr int64_t MOST_PARTS = 16;

// pooled float32 [B, Q, M, C / M] and log of the sum of exponentials float32 [B, Q, M] (0 where weights are equal)
std::tuple<Tensor, Tensor> pool_prototypes(Tensor features, std::optional<Tensor> queries, std::optional<Tensor> allowed,
                                           std::optional<Tensor> position, int64_t heads) {
  const Call call(features, queries, allowed, position, queries ? queries->size(1) : allowed->size(1), heads);
  Tensor pooled = torch::stable::new_empty(features, {call.images, call.asked, heads, call.channels}, ScalarType::Float);
  Tensor logsumexp = torch::stable::new_empty(features, {call.images, call.asked, heads}, ScalarType::Float);
  auto* pooled_out = static_cast<float*>(pooled.mutable_data_ptr());
  auto* logsumexp_out = static_cast<float*>(logsumexp.mutable_data_ptr());

  const int64_t tiles = call.tiles(), each = (tiles + MOST_PARTS - 1) / MOST_PARTS, parts = (tiles + each - 1) / each;
  std::vector<Part> all(call.problems() * parts, Part(call));
  torch::stable::parallel_for(0, call.problems() * parts, 1, [&](int64_t begin, int64_t end) {
    Room room(call);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t problem = at / parts, first = at % parts * each;
      for (int64_t number = first; number < std::min(tiles, first + each); ++number) {
        const Tile tile = room.tile(call, problem, number);
        if (call.queries) kernels().scores(tile, call.queries_of(problem), room.scores.data());
        kernels().pool(tile, int(call.lanes), int(call.channels), call.queries ? room.scores.data() : nullptr, room.weights.data(),
                       all[at].pool());
      }
    }
  });
  torch::stable::parallel_for(0, call.problems() * call.asked, 16, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t problem = at / call.asked, query = at % call.asked;
      const int64_t to = (problem / heads * call.asked + query) * heads + problem % heads;
      const Part* own = all.data() + problem * parts;
      float maximum = call.queries ? -INFINITE : 0.f;
      for (int64_t part = 0; call.queries && part < parts; ++part) maximum = std::max(maximum, own[part].maximum[query]);
      float total = 0;
      float* out = pooled_out + to * call.channels;
      std::fill_n(out, call.channels, 0.f);
      for (int64_t part = 0; part < parts; ++part) {
        const float factor = call.queries ? std::exp(own[part].maximum[query] - maximum) : 1.f;
        total += factor * own[part].total[query];
        const float* sum = own[part].sum.data() + query * call.channels;
        for (int64_t c = 0; c < call.channels; ++c) out[c] += factor * sum[c];
      }
      for (int64_t c = 0; c < call.channels; ++c) out[c] /= total;
      logsumexp_out[to] = call.queries ? maximum + std::log(total) : 0.f;
    }
  });
  return {pooled, logsumexp};
}

// Multiply-adds of all threads with registers alone, for the roofline: returns how many were done.
int64_t burst(int64_t rounds) {
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<float> results(threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) results[thread] = kernels().burst(rounds);
  });
  // read, so that the work cannot be left out
  const bool finite = std::isfinite(results[0]);
  return finite ? threads * rounds * 16 * kernels().width : 0;
}

std::string instruction_set() { return kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY(emca_native, library) {
  library.def(
      "select_prototypes(Tensor features, Tensor queries, Tensor? allowed, Tensor? position, int k, int heads) -> (Tensor, Tensor)");
  library.def(
      "pool_prototypes(Tensor features, Tensor? queries, Tensor? allowed, Tensor? position, int heads) -> (Tensor, Tensor)");
  library.def("burst(int rounds) -> int");
  library.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(emca_native, CPU, library) {
  library.impl("select_prototypes", TORCH_BOX(&select_prototypes));
  library.impl("pool_prototypes", TORCH_BOX(&pool_prototypes));
}

STABLE_TORCH_LIBRARY_IMPL(emca_native, CompositeExplicitAutograd, library) {
  library.impl("burst", TORCH_BOX(&burst));
  library.impl("instruction_set", TORCH_BOX(&instruction_set));
}
