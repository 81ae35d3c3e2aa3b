// What the kernels are told of a call.
#pragma once
#include "launch.h"

namespace emca::cuda {

struct Problem {
  int pixels, queries;
  // 1, or 2 with positions: (F + X) Q^T = F Q^T + X Q^T, so their panels follow those of the features into the same accumulators
  int sources;
  // from an image to the next in each map: 1, or 0 where all share one
  int features_step, queries_step, position_step;
  Room room;
  Grid grid;
  Allowed allowed;
  // [images, queries, splits]
  uint64_t* keys;
};

inline Problem make_problem(const Call& call) {
  const Rows &features = call.features, &queries = call.queries, &position = call.position;
  return {features.rows,   queries.rows,   1 + (position.data != nullptr), features.step(), queries.step(),
          position.step(), call.plan.room, call.plan.grid,                 call.allowed,    call.keys};
}

}  // namespace emca::cuda
