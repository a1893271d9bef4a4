// Reads lines "n d", and writes the quotient that Divisor gives.
#include <cinttypes>
#include <cstdio>

#include "common/bilinear.h"

int main() {
  int64_t n, d;
  while (std::scanf("%" SCNd64 " %" SCNd64, &n, &d) == 2)
    std::printf("%" PRId64 "\n", segadv::Divisor(d).quotient(n));
  return 0;
}
