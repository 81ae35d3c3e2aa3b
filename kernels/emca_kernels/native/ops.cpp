// The boundary to torch (its stable interface only).
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "attend.h"
#include "pool.h"
#include "select.h"

namespace emca {
namespace {

// Multiply-adds of all threads with registers alone, for the roofline: returns how many were done.
int64_t burst(int64_t rounds) {
  const Kernels& kernels = EMCA_SERVING(kernels);
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<float> results(threads);
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) results[thread] = kernels.burst(rounds);
  });
  // read, so that the work cannot be left out
  const bool finite = std::isfinite(results[0]);
  return finite ? threads * rounds * 16 * kernels.width : 0;
}

std::string instruction_set() { return EMCA_SERVING(kernels).name; }

}  // namespace
}  // namespace emca

STABLE_TORCH_LIBRARY(emca_native, library) {
  library.def(
      "select_prototypes(Tensor features, Tensor queries, Tensor? allowed, Tensor? position, int k, int heads) -> (Tensor, Tensor)");
  library.def(
      "pool_prototypes(Tensor features, Tensor? queries, Tensor? allowed, Tensor? position, int heads) -> (Tensor, Tensor)");
  library.def(
      "emca_attention(Tensor features, Tensor queries, Tensor? allowed, Tensor? position, Tensor? query_position, Tensor[] parameters,"
      " Tensor? scale, str selection, str residual) -> (Tensor, Tensor, Tensor)");
  library.def("burst(int rounds) -> int");
  library.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(emca_native, CPU, library) {
  library.impl("select_prototypes", TORCH_BOX(&emca::select_prototypes));
  library.impl("pool_prototypes", TORCH_BOX(&emca::pool_prototypes));
  library.impl("emca_attention", TORCH_BOX(&emca::emca_attention));
}

STABLE_TORCH_LIBRARY_IMPL(emca_native, CompositeExplicitAutograd, library) {
  library.impl("burst", TORCH_BOX(&emca::burst));
  library.impl("instruction_set", TORCH_BOX(&emca::instruction_set));
}
