// a * b + c, rounded once, for tests/ptx.py.
#include <cmath>

extern "C" void fma32(const float* a, const float* b, const float* c, float* to, long n) {
  for (long i = 0; i < n; ++i) to[i] = std::fma(a[i], b[i], c[i]);
}

extern "C" void fma64(const double* a, const double* b, const double* c, double* to, long n) {
  for (long i = 0; i < n; ++i) to[i] = std::fma(a[i], b[i], c[i]);
}
