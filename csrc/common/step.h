// The mathematics of the steps in pixel space, and of scaling a gradient.
#pragma once

#include "dtype.h"

namespace segadv {

template <class A>
SEGADV_INLINE A sign(A x) {  // sign(0) = 0, and a NaN does not move
  return static_cast<A>(x > A(0)) - static_cast<A>(x < A(0));
}

template <class A>
SEGADV_INLINE A clip(A x, A low, A high) {  // keeps NaN
  return x < low ? low : (x > high ? high : x);
}

// Onto the max-norm ball around a pixel. A NaN radius makes the result NaN: the ball is never dropped silently.
template <class A>
SEGADV_INLINE A project(A x, A origin, A eps) {
  const A upper = origin + eps, lower = origin - eps;
  x = ((x > upper) | (upper != upper)) ? upper : x;
  return x < lower ? lower : x;
}

// What has no gradient keeps none, also where an overflow makes the factor infinite.
template <class A>
SEGADV_INLINE A scale(A grad, A factor) {
  return grad == A(0) ? A(0) : grad * factor;
}

template <class A>
SEGADV_INLINE bool is_finite(A x) {
  return x - x == A(0);
}

// eps = gain / norm (Wiens & Hammer 2022, eq. 18), 0 where that means nothing; max_eps < 0: no cap.
template <class A>
SEGADV_INLINE A newton_eps(A gain, A norm, bool clamp_negative, double max_eps) {
  if (!is_finite(gain) || !(norm > A(0))) return A(0);  // max_eps would cap an infinity
  A eps = gain / norm;
  if (clamp_negative && eps < A(0)) eps = A(0);
  if (max_eps >= 0) eps = clip(eps, static_cast<A>(-max_eps), static_cast<A>(max_eps));
  return is_finite(eps) ? eps : A(0);
}

}  // namespace segadv
