// Selection: the best pixels of each query, over tiles in any order.
#pragma once
#include <mutex>
#include <tuple>

#include "call.h"

namespace emca {
namespace {

constexpr int32_t NOWHERE = std::numeric_limits<int32_t>::max();

// Runs `step(problem, tile number)` over all tiles in threads; `begin(problem)` before the first and `end(problem)` after the last tile of a
// thread's part of a problem.
template <class Worker>
void over_tiles(const Call& call, const Worker& make) {
  // fewer multiply-adds than this are not worth another thread
  constexpr int64_t WORTH = 1 << 20;
  const int64_t tiles = call.tiles(), work = call.tile_pixels * call.packed_size();
  const int64_t grain = std::max<int64_t>(1, WORTH / std::max<int64_t>(1, work));
  parallel_for(0, call.problems() * tiles, grain, [&](int64_t begin, int64_t end) {
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
  Floats score;
  Room<int32_t> index;

  explicit Best(int64_t lanes) : score(lanes), index(lanes) { clear(lanes); }
  // where nothing was better than nothing, some pixel that exists
  int64_t pixel(int64_t query) const { return index[query] == NOWHERE ? 0 : index[query]; }
  void clear(int64_t lanes) {
    std::fill_n(score.data(), lanes, -INFINITE);
    std::fill_n(index.data(), lanes, NOWHERE);
  }
};

struct SelectBest {
  const Call& call;
  std::vector<Best>& all;
  std::mutex& merging;
  Best mine{call.lanes};
  Floats room = call.tile_room();

  void begin(int64_t) { mine.clear(call.lanes); }
  void step(int64_t problem, int64_t number) {
    call.isa.best(call.tile(problem, number, room), call.queries_of(problem), mine.score.data(), mine.index.data());
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
  Floats room = call.tile_room(), scores{call.tile_pixels * call.lanes};

  void begin(int64_t) { mine.clear(); }
  void step(int64_t problem, int64_t number) {
    const Tile tile = call.tile(problem, number, room);
    call.isa.scores(tile, call.queries_of(problem), scores.data());
    for (int p = 0; p < tile.count; ++p)
      for (int64_t query = 0; query < call.asked; ++query) {
        const float score = scores[p * call.lanes + query];
        if (score > -INFINITE) mine.offer(query, {score, int32_t(tile.first + p)});
      }
  }
  void end(int64_t problem) {
    std::lock_guard lock(merging);
    for (int64_t query = 0; query < call.asked; ++query)
      for (int64_t slot = 0; slot < mine.k; ++slot) all[problem].offer(query, mine.list[query * mine.k + slot]);
  }
};

// The best pixel of every query, by problem.
std::vector<Best> best_pixels(const Call& call) {
  std::vector<Best> all;
  for (int64_t problem = 0; problem < call.problems(); ++problem) all.emplace_back(call.lanes);
  std::mutex merging;
  over_tiles(call, [&] { return SelectBest{call, all, merging}; });
  return all;
}

// indices int64 [B, Q, M, k] and scores float32 [B, Q, M, k]
std::tuple<Tensor, Tensor> select_prototypes(Tensor features, Tensor queries, std::optional<Tensor> allowed, std::optional<Tensor> position,
                                             int64_t k, int64_t heads) {
  Call call(features, allowed, position, queries.size(1), heads);
  prepare(call, queries);
  Tensor indices = torch::stable::new_empty(queries, {call.images, call.asked, heads, k}, ScalarType::Long);
  Tensor scores = torch::stable::new_empty(queries, {call.images, call.asked, heads, k}, ScalarType::Float);
  auto* index_out = static_cast<int64_t*>(indices.mutable_data_ptr());
  auto* score_out = static_cast<float*>(scores.mutable_data_ptr());
  const auto write = [&](int64_t problem, int64_t query, int64_t slot, Candidate found) {
    const int64_t at = ((problem / heads * call.asked + query) * heads + problem % heads) * k + slot;
    index_out[at] = found.index;
    score_out[at] = found.score;
  };
  if (k == 1) {
    const std::vector<Best> all = best_pixels(call);
    for (int64_t problem = 0; problem < call.problems(); ++problem)
      for (int64_t query = 0; query < call.asked; ++query) {
        const Best& best = all[problem];
        write(problem, query, 0, {best.score[query], int32_t(best.pixel(query))});
      }
  } else {
    std::mutex merging;
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

}  // namespace
}  // namespace emca
