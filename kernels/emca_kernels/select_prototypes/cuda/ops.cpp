// The boundary to torch (its stable interface only).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "launch.h"

namespace {

using namespace emca::cuda;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Number number_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return Number::bfloat16;
    case ScalarType::Half: return Number::float16;
    default: STD_TORCH_CHECK(false, "expected bfloat16 or float16");
  }
}

Rows rows_of(const Tensor& tensor) {
  const int64_t channels = tensor.size(2);
  STD_TORCH_CHECK(channels % PANEL_CHANNELS == 0 && 0 < channels && channels <= MAX_CHANNELS,
                  "expected 64, 128, 192 or 256 channels, found ", channels);
  STD_TORCH_CHECK(tensor.stride(2) == 1, "expected channels that are neighbours in memory");
  return {tensor.const_data_ptr(), int(tensor.size(0)), int(tensor.size(1)), int(channels), tensor.stride(0), tensor.stride(1)};
}

Allowed allowed_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.stride(2) == 1, "expected a mask whose pixels are neighbours in memory");
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Bool || type == ScalarType::Int, "expected a mask of bool bytes or int32 words");
  return {type == ScalarType::Bool ? Mask::bytes : Mask::words, tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

void* current_stream(int device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// features [B, P, C], queries [B, Q, C], allowed bool [B, Q, P] or bits int32 [B, Q, ceil(P / 32)], position [B, P, C]
// to indices int64 [B, Q, 1, 1] and scores [B, Q, 1, 1] in the numbers of the features
std::tuple<Tensor, Tensor> select_prototypes(Tensor features, Tensor queries, std::optional<Tensor> allowed, std::optional<Tensor> position) {
  const int device = features.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Call call;
  call.number = number_of(features);
  call.features = rows_of(features);
  call.queries = rows_of(queries);
  if (position) call.position = rows_of(*position);
  if (allowed) call.allowed = allowed_of(*allowed);
  const Rows& rows = call.features;
  const int asked = call.queries.rows;
  call.plan = make_plan(rows.images, rows.rows, asked, rows.channels, count_processors(device));
  Tensor keys = torch::stable::new_empty(queries, {rows.images, asked, call.plan.grid.splits}, ScalarType::Long);
  Tensor indices = torch::stable::new_empty(queries, {rows.images, asked, 1, 1}, ScalarType::Long);
  Tensor scores = torch::stable::new_empty(queries, {rows.images, asked, 1, 1}, features.scalar_type());
  call.keys = static_cast<uint64_t*>(keys.mutable_data_ptr());
  call.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  call.scores = scores.mutable_data_ptr();
  launch(call, current_stream(device));
  return {indices, scores};
}

}  // namespace

STABLE_TORCH_LIBRARY(emca_cuda, library) {
  library.def("select_prototypes(Tensor features, Tensor queries, Tensor? allowed, Tensor? position) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(emca_cuda, CUDA, library) { library.impl("select_prototypes", TORCH_BOX(&select_prototypes)); }
