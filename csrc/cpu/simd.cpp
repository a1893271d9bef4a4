// Which instructions the kernels use.
#include "cpu/simd.h"

#include <stdexcept>

#include "segadv.h"

namespace segadv::cpu {
namespace {

int best_level() {
#if defined(SEGADV_HAVE_LEVELS)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi") ||
      !__builtin_cpu_supports("bmi2"))
    return 0;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
  return wide ? 4 : 3;
#else
  return 0;
#endif
}

const char* name_of(int level) { return level == 4 ? "x86-64-v4" : level == 3 ? "x86-64-v3" : "baseline"; }

}  // namespace

int level = best_level();

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const int lower : {4, 3, 0})
    if (lower <= best_level()) names.emplace_back(name_of(lower));
  return names;
}

std::string instruction_set() { return name_of(level); }

void use_instruction_set(const std::string& name) {
  for (const int lower : {4, 3, 0}) {
    if (lower <= best_level() && name == name_of(lower)) {
      level = lower;
      return;
    }
  }
  throw std::invalid_argument("segadv: this machine has no instruction set " + name);
}

}  // namespace segadv::cpu
