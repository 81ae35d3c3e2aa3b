#include "host.h"

#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace emca {
namespace {

using Named = std::pair<const char*, Isa>;

// What this CPU can run, the fastest first.
std::vector<Named> able() {
  std::vector<Named> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512bf16")) found.emplace_back("avx512bf16", Isa::avx512bf16);
    found.emplace_back("avx512", Isa::avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.emplace_back("avx2", Isa::avx2);
#endif
  found.emplace_back("base", Isa::base);
  return found;
}

}  // namespace

Isa isa() {
  static const std::vector<Named> known = able();
  const char* asked = std::getenv("EMCA_ISA");
  if (!asked || !*asked) return known.front().second;
  std::string names;
  for (const auto& [name, isa] : known) {
    if (!std::strcmp(name, asked)) return isa;
    names += std::string(names.empty() ? "" : ", ") + name;
  }
  STD_TORCH_CHECK(false, "EMCA_ISA='", asked, "' is no instruction set of this CPU; known here: ", names);
}

}  // namespace emca
