// Products of small tiles held by a warp: 3xTF32 and float64 on the tensor cores, float32 without them.
//
// Every engine adds the product of a left (16 x kStep) and a right (kStep x 8) tile to a 16 x 8 tile of sums.
// A lane holds four sums, wherever they come from: with g = lane / 4, t = lane % 4
//     sum 0: (g, 2t)   sum 1: (g, 2t + 1)   sum 2: (g + 8, 2t)   sum 3: (g + 8, 2t + 1)
// which is the accumulator of mma.m16n8k8 (.tf32), and of two mma.m8n8k4 (.f64), one below the other (PTX
// ISA, "Matrix Fragments for mma.m16n8k8", "... mma.m8n8k4 with .f64").
#pragma once

#include "port.h"

namespace rlsedit {

RLSEDIT_DEVICE uint32_t bits(float x) {
#ifdef RLSEDIT_EMULATE
  uint32_t result;
  std::memcpy(&result, &x, 4);
  return result;
#else
  return __float_as_uint(x);
#endif
}

RLSEDIT_DEVICE float number(uint32_t bits) {
#ifdef RLSEDIT_EMULATE
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
#else
  return __uint_as_float(bits);
#endif
}

// A left operand is read as p[row * ld + k], a right one as p[column * ld + k], or p[k * ld + column] if
// TURNED.
template <bool TURNED>
RLSEDIT_DEVICE int place(int column, int k, int ld) {
  return TURNED ? k * ld + column : column * ld + k;
}

// float32 by three products of tf32 numbers: x = high + low, high with 11 significant bits, low with the next
// 11; low times low is left out (2^-22 of the product). The tensor cores may truncate their sums: the three
// products of 8 terms start from zero and are added to the running sum by a rounded addition.
struct Tf32x3 {
  using T = float;
  static constexpr int kStep = 8, kBlocks = 2;  // blocks of 256 threads that registers are to allow

  struct Left {  // 0: (g, t)  1: (g + 8, t)  2: (g, t + 4)  3: (g + 8, t + 4)
    uint32_t high[4], low[4];
  };
  struct Right {  // 0: (k = t, g)  1: (k = t + 4, g)
    uint32_t high[2], low[2];
  };

  // `high` to nearest, by two integer operations (cvt.rna.tf32 takes five); `low` is exact, and the tensor
  // core ignores its last 13 bits. A NaN stays one: where `high` overflows to zero, `low` is NaN. Rounding
  // `low` as well would lose it.
  RLSEDIT_DEVICE static void split(float x, uint32_t& high, uint32_t& low) {
    high = (bits(x) + 0x1000u) & 0xffffe000u;
    low = bits(x - number(high));
  }

  RLSEDIT_DEVICE static Left left(const float* p, int ld) {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    Left a;
#pragma unroll
    for (int i = 0; i < 4; ++i) split(p[(g + 8 * (i & 1)) * ld + t + 4 * (i >> 1)], a.high[i], a.low[i]);
    return a;
  }

  template <bool TURNED>
  RLSEDIT_DEVICE static Right right(const float* p, int ld) {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    Right b;
#pragma unroll
    for (int i = 0; i < 2; ++i) split(p[place<TURNED>(g, t + 4 * i, ld)], b.high[i], b.low[i]);
    return b;
  }

  RLSEDIT_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef RLSEDIT_EMULATE
    emulate::mma_tf32(d, a, b);
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
  }

  RLSEDIT_DEVICE static void multiply(float (&sum)[4], const Left& a, const Right& b) {
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma(part, a.low, b.high);
    mma(part, a.high, b.low);
    mma(part, a.high, b.high);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += part[i];
  }
};

// float64 on the tensor cores, IEEE.
struct Dmma {
  using T = double;
  static constexpr int kStep = 4, kBlocks = 1;

  struct Left {  // 0: (g, t)  1: (g + 8, t)
    double v[2];
  };
  struct Right {  // (k = t, g)
    double v;
  };

  RLSEDIT_DEVICE static Left left(const double* p, int ld) {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    return {{p[g * ld + t], p[(g + 8) * ld + t]}};
  }

  template <bool TURNED>
  RLSEDIT_DEVICE static Right right(const double* p, int ld) {
    return {p[place<TURNED>(lane_index() >> 2, lane_index() & 3, ld)]};
  }

  RLSEDIT_DEVICE static void mma(double& d0, double& d1, double a, double b) {
#ifdef RLSEDIT_EMULATE
    emulate::mma_f64(d0, d1, a, b);
#else
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
        : "+d"(d0), "+d"(d1)
        : "d"(a), "d"(b));
#endif
  }

  RLSEDIT_DEVICE static void multiply(double (&sum)[4], const Left& a, const Right& b) {
    mma(sum[0], sum[1], a.v[0], b.v);
    mma(sum[2], sum[3], a.v[1], b.v);
  }
};

// float32 in IEEE arithmetic, fused multiply and add.
struct Ffma {
  using T = float;
  static constexpr int kStep = 1, kBlocks = 1;

  struct Left {  // rows g, g + 8
    float v[2];
  };
  struct Right {  // columns 2t, 2t + 1
    float v[2];
  };

  RLSEDIT_DEVICE static Left left(const float* p, int ld) {
    const int g = lane_index() >> 2;
    return {{p[g * ld], p[(g + 8) * ld]}};
  }

  template <bool TURNED>
  RLSEDIT_DEVICE static Right right(const float* p, int ld) {
    const int t = lane_index() & 3;
    return {{p[place<TURNED>(2 * t, 0, ld)], p[place<TURNED>(2 * t + 1, 0, ld)]}};
  }

  RLSEDIT_DEVICE static void multiply(float (&sum)[4], const Left& a, const Right& b) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = fmaf(a.v[i >> 1], b.v[i & 1], sum[i]);
  }
};

// The engine whose products are IEEE for an element type.
template <class T>
struct IeeeEngine {
  using type = Ffma;
};
template <>
struct IeeeEngine<double> {
  using type = Dmma;
};
template <class T>
using Ieee = typename IeeeEngine<T>::type;

// A warp's tile: sum[m][n] += left rows [16 m, 16 m + 16) times right columns [8 n, 8 n + 8), over `depth` (a
// multiple of 8) terms.
template <class E, int MT, int NT, bool TURNED>
RLSEDIT_DEVICE void multiply(typename E::T (&sum)[MT][NT][4], const typename E::T* left, int left_ld,
                             const typename E::T* right, int right_ld, int depth) {
#pragma unroll(E::kStep == 1 ? 8 : 1)
  for (int k = 0; k < depth; k += E::kStep) {
    typename E::Left a[MT];
#pragma unroll
    for (int m = 0; m < MT; ++m) a[m] = E::left(left + 16 * m * left_ld + k, left_ld);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const typename E::Right b =
          E::template right<TURNED>(right + place<TURNED>(8 * n, k, right_ld), right_ld);
#pragma unroll
      for (int m = 0; m < MT; ++m) E::multiply(sum[m][n], a[m], b);
    }
  }
}

template <class T, int MT, int NT>
RLSEDIT_DEVICE void clear(T (&sum)[MT][NT][4]) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[m][n][i] = T(0);
}

// f(row, column, x, y) for every two sums that the lane holds side by side of a warp's tile.
template <class T, int MT, int NT, class F>
RLSEDIT_DEVICE void for_each_pair(T (&sum)[MT][NT][4], const F& f) {
  const int g = lane_index() >> 2, t = lane_index() & 3;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        f(16 * m + g + 8 * half, 8 * n + 2 * t, sum[m][n][2 * half], sum[m][n][2 * half + 1]);
}

// f(row, column, sum) for every sum that the lane holds of a warp's tile, adjacent columns after each other.
template <class T, int MT, int NT, class F>
RLSEDIT_DEVICE void for_each_sum(T (&sum)[MT][NT][4], const F& f) {
  for_each_pair(sum, [&](int i, int j, T& x, T& y) {
    f(i, j, x);
    f(i, j + 1, y);
  });
}

}  // namespace rlsedit
