// Tensor maps and launches.
#include "launch.h"

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "hopper.cuh"
#include "kernels.cuh"

namespace emca::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// The driver's function, found at run time: the library must load where there is no driver.
PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result), "looking for TMA");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result), "looking for TMA");
#endif
  if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("the CUDA driver is older than 12.0: no cuTensorMapEncodeTiled");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
}

// Boxes of `box_rows` rows by one panel of channels.
TensorMap make_map(const Rows& rows, Number number, int box_rows) {
  static const auto encode = find_encoder();
  // a stride that leads nowhere may be any number, and is checked all the same
  const cuuint64_t row_bytes = 2 * (rows.rows > 1 ? rows.row_stride : rows.channels);
  const cuuint64_t image_bytes = rows.step() ? 2 * rows.image_stride : rows.rows * row_bytes;
  const cuuint64_t sizes[] = {cuuint64_t(rows.channels), cuuint64_t(rows.rows), cuuint64_t(rows.step() ? rows.images : 1)};
  const cuuint64_t strides[] = {row_bytes, image_bytes};
  const cuuint32_t box[] = {PANEL_CHANNELS, cuuint32_t(box_rows), 1}, steps[] = {1, 1, 1};
  TensorMap map;
  const CUresult result =
      encode(&map, number == Number::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
             const_cast<void*>(rows.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("TMA cannot read " + std::to_string(rows.rows) + " rows that are " + std::to_string(row_bytes) +
                             " bytes apart: CUDA error " + std::to_string(result));
  return map;
}

template <Number NUMBER, Mask MASK>
auto kernel_of(int tile) {
  if (tile == 32) return &best_of_splits<NUMBER, 32, MASK>;
  return tile == 64 ? &best_of_splits<NUMBER, 64, MASK> : &best_of_splits<NUMBER, 128, MASK>;
}

template <Number NUMBER>
auto kernel_of(int tile, Mask mask) {
  if (mask == Mask::none) return kernel_of<NUMBER, Mask::none>(tile);
  return mask == Mask::bytes ? kernel_of<NUMBER, Mask::bytes>(tile) : kernel_of<NUMBER, Mask::words>(tile);
}

template <Number NUMBER>
void launch_splits(const Call& call, const Problem& problem, cudaStream_t stream) {
  const Room& room = problem.room;
  const TensorMap features = make_map(call.features, NUMBER, room.tile), queries = make_map(call.queries, NUMBER, room.queries());
  const TensorMap position = call.position.data ? make_map(call.position, NUMBER, room.tile) : features;
  const auto kernel = kernel_of<NUMBER>(room.tile, call.allowed.kind);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(room.bytes())), "asking for shared memory");
  const dim3 grid(problem.grid.splits, problem.grid.query_blocks, call.features.images);
  kernel<<<grid, room.threads(), room.bytes(), stream>>>(features, position, queries, problem);
  check(cudaGetLastError(), "launching best_of_splits");
}

template <Number NUMBER>
void launch_merge(const Call& call, cudaStream_t stream) {
  // its start may overlap with the end of the kernel before
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  const int64_t count = int64_t(call.features.images) * call.queries.rows;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(merge_blocks(count));
  launch.blockDim = dim3(MERGE_THREADS);
  launch.stream = stream;
  launch.attrs = &overlap;
  launch.numAttrs = 1;
  const uint64_t* keys = call.keys;
  check(cudaLaunchKernelEx(&launch, &best_of_all<NUMBER>, keys, count, call.plan.grid.splits, call.indices, call.scores),
        "launching best_of_all");
}

template <Number NUMBER>
void launch_both(const Call& call, cudaStream_t stream) {
  launch_splits<NUMBER>(call, make_problem(call), stream);
  launch_merge<NUMBER>(call, stream);
}

}  // namespace

int count_processors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "counting multiprocessors");
  return count;
}

void launch(const Call& call, void* stream) {
  const auto both = call.number == Number::bfloat16 ? &launch_both<Number::bfloat16> : &launch_both<Number::float16>;
  both(call, static_cast<cudaStream_t>(stream));
}

}  // namespace emca::cuda
