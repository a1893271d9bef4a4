// Reads lines, and writes what csrc/common/bilinear.h makes of them, in 64 bits and, where it may, in 32:
//
//   divide n d                         the quotient that Divisor gives
//   axis in out align_corners o quad   whether it is narrow, what is left over, the quad's outputs from o on
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "common/bilinear.h"

int main() {
  char what[16];
  int64_t a, b, align_corners, o, quad;
  while (std::scanf("%15s %" SCNd64 " %" SCNd64, what, &a, &b) == 3) {
    if (std::strcmp(what, "divide") == 0) {
      const segadv::Divisor divisor(b);
      const int64_t quotient = divisor.quotient(a);
      const bool same = a >> 31 != 0 || divisor.quotient(static_cast<int32_t>(a)) == quotient;
      std::printf("%" PRId64 " %d\n", quotient, same);
    } else if (std::scanf("%" SCNd64 " %" SCNd64 " %" SCNd64, &align_corners, &o, &quad) == 3) {
      const segadv::Axis axis = segadv::make_axis(a, b, align_corners != 0);
      const int64_t rest = axis.rest(o, quad), outputs = axis.outputs_from(o, rest);
      const int32_t o32 = static_cast<int32_t>(o), rest32 = axis.rest(o32, static_cast<int32_t>(quad));
      const bool same = rest32 == rest && axis.outputs_from(o32, rest32) == outputs;
      std::printf("%d %" PRId64 " %" PRId64 " %d\n", axis.is_narrow(), rest, outputs, same || !axis.is_narrow());
    }
  }
  return 0;
}
