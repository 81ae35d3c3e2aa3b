// One call of the operator on the device, without torch.
#pragma once
#include <cstdint>

#include "layout.h"

namespace emca::cuda {

// [images, rows, channels], channels neighbours in memory, strides in elements; images of stride 0 are one.
struct Rows {
  const void* data = nullptr;
  int images = 0, rows = 0, channels = 0;
  int64_t image_stride = 0, row_stride = 0;

  constexpr int step() const { return images > 1 && image_stride; }
};

// What queries allow: bytes [images, queries, pixels] or words [images, queries, ceil(pixels / 32)], strides in elements.
struct Allowed {
  Mask kind = Mask::none;
  const void* data = nullptr;
  int64_t image_stride = 0, query_stride = 0;
};

struct Call {
  Number number{};
  // position without data: none
  Rows features, queries, position;
  Allowed allowed;
  Plan plan{};
  // [images, queries, splits] of room, then what is found [images, queries]
  uint64_t* keys = nullptr;
  int64_t* indices = nullptr;
  void* scores = nullptr;
};

int count_processors(int device);

// On a stream of the current device. Throws std::runtime_error with CUDA's words.
void launch(const Call& call, void* stream);

}  // namespace emca::cuda
