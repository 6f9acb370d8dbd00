// downdate_(C, Z, alpha): C <- C + alpha Z Z' in place, exactly symmetric
//
// A block takes one tile of the lower triangle (128 x 128; 64 x 64 in float64), adds the product of two row
// blocks of Z and stores the tile and its mirror image:
//
//      | .           |     tile (I, J), I >= J:  C_IJ + alpha Z_I Z_J'
//      | x .         |        -> (I, J) from registers
//      | x x .       |        -> (J, I) by 16 bytes, transposed in shared memory
//
// On the diagonal what is below goes to both places: rounding of high and low parts does not commute.
// Bytes: d^2 / 2 read, d^2 written, Z from the second-level cache; flops d^2 u.
#include "downdate_.h"

#include "tile.h"

namespace rlsedit {
namespace {

template <class E>
struct ChangeTile {
  using Product = TileProduct<E, 2, 4, 4, 4, false>;
};
template <>
struct ChangeTile<Dmma> {
  using Product = TileProduct<Dmma, 2, 4, 2, 2, false>;
};
template <class E>
using Change = typename ChangeTile<E>::Product;

template <class P>
constexpr int kMirrorLd =
    P::kRows + 16 / static_cast<int>(sizeof(typename P::T));  // no two lanes in one bank

template <class P>
constexpr size_t kMirrorBytes = P::kColumns * kMirrorLd<P> * sizeof(typename P::T);

template <class E>
__global__ void __launch_bounds__(Change<E>::kThreads, E::kBlocks)
    change_kernel(Matrices<typename E::T> Cs, Matrices<const typename E::T> Z, const int32_t* info, int64_t d,
                  int64_t u, typename E::T alpha, typename E::T scale, int stages) {
  using T = typename E::T;
  using P = Change<E>;
  const int64_t b = blockIdx.z;
  if (info != nullptr && info[b] != 0) return;
  int i0, j0;
  lower_tile(static_cast<int>(blockIdx.x), i0, j0);
  const int64_t row = static_cast<int64_t>(i0) * P::kRows, column = static_cast<int64_t>(j0) * P::kColumns;
  T* memory = shared_memory<T>();
  prefetch_tile<P::kRows, P::kColumns, P::kThreads>(Cs[b], row, column, d, d);
  P product;
  clear(product.sum);
  product.add(Z[b], row, d, Z[b], column, d, 0, u, memory, stages);

  const Matrix<T> C = Cs[b];
  const bool diagonal = i0 == j0;
  // Pairs of elements, none of them outside: the same for the whole block.
  const bool whole = paired(C) && !diagonal && row + P::kRows <= d && column + P::kColumns <= d;
  const int first_i = P::warp_row() + (lane_index() >> 2),
            first_j = P::warp_column() + 2 * (lane_index() & 3);
  T* const first = &C.at(row + first_i, column + first_j);
#pragma unroll
  for (int m = 0; m < P::kRowTiles; ++m) {
    // All loads of a row of tiles before its first store. The compiler moves no load over a store to the same
    // matrix, so one after the other would each wait for the memory.
    const auto each = [&](const auto& f) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < P::kColumnTiles; ++n)
          f(half, n, first_i + 16 * m + 8 * half, first_j + 8 * n, first + (16 * m + 8 * half) * C.rs);
    };
    Pair<T> old[2][P::kColumnTiles];
    if (whole)
      each([&](int half, int n, int, int, T* at) { old[half][n] = *reinterpret_cast<Pair<T>*>(at + 8 * n); });
    else
      each([&](int half, int n, int i, int j, T* at) {
        at += 8 * n * C.cs;
        old[half][n].x = row + i < d && column + j < d ? *at : T(0);
        old[half][n].y = row + i < d && column + j + 1 < d ? at[C.cs] : T(0);
      });
    each([&](int half, int n, int i, int j, T*) {
      Pair<T>& now = old[half][n];
      now.x = (now.x + alpha * product.sum[m][n][2 * half]) * scale;
      now.y = (now.y + alpha * product.sum[m][n][2 * half + 1]) * scale;
      memory[j * kMirrorLd<P> + i] = now.x;
      memory[(j + 1) * kMirrorLd<P> + i] = now.y;
    });
    if (whole)
      each([&](int half, int n, int, int, T* at) {
        store_adjacent(at + 8 * n, {old[half][n].x, old[half][n].y});
      });
    else
      each([&](int half, int n, int i, int j, T* at) {
        at += 8 * n * C.cs;
        if (row + i < d && column + j < d && (!diagonal || i >= j)) *at = old[half][n].x;
        if (row + i < d && column + j + 1 < d && (!diagonal || i > j)) at[C.cs] = old[half][n].y;
      });
  }
  __syncthreads();
  constexpr int kWide = 16 / sizeof(T), kAcross = P::kRows / kWide;
  const bool by16 = wide(C) && !diagonal;
  for (int place = static_cast<int>(threadIdx.x); place < P::kColumns * kAcross; place += P::kThreads) {
    const int j = place / kAcross, i = place % kAcross * kWide;
    if (column + j >= d) continue;
    const T* from = memory + j * kMirrorLd<P> + i;
    T* to = &C.at(column + j, row + i);
    if (by16 && row + i + kWide <= d) {
      *reinterpret_cast<int4*>(to) = *reinterpret_cast<const int4*>(from);
    } else {
#pragma unroll
      for (int k = 0; k < kWide; ++k)
        if (row + i + k < d && (!diagonal || i + k > j)) to[k * C.cs] = from[k];
    }
  }
}

}  // namespace

template <class E>
void change(Call& call, Matrices<typename E::T> C, Matrices<const typename E::T> Z, int64_t d, int64_t u,
            double alpha, double scale, const int32_t* info) {
  using T = typename E::T;
  using P = Change<E>;
  static_assert(P::kRows == P::kColumns, "a diagonal tile lies on the diagonal");
  const int64_t side = ceil_div(d, P::kRows);
  const dim3 grid(static_cast<unsigned>(side * (side + 1) / 2), 1, static_cast<unsigned>(call.batch()));
  const int stages = call.stages(P::kBufferBytes);
  launch(change_kernel<E>, grid, P::kThreads, greater(stages * P::kBufferBytes, kMirrorBytes<P>),
         call.stream(), by_rows(C), Z, info, d, u, static_cast<T>(alpha), static_cast<T>(scale), stages);
}

#define RLSEDIT_INSTANTIATE(E)                                                                           \
  template void change<E>(Call&, Matrices<E::T>, Matrices<const E::T>, int64_t, int64_t, double, double, \
                          const int32_t*);
RLSEDIT_INSTANTIATE(Tf32x3)
RLSEDIT_INSTANTIATE(Ffma)
RLSEDIT_INSTANTIATE(Dmma)
#undef RLSEDIT_INSTANTIATE

void downdate_(Tensor C, Tensor Z, double alpha, int64_t precision) {
  Call call("downdate_", "C", C);
  call.square("C", C);
  call.writable("C", C);
  call.floating("Z", Z);
  const int64_t d = columns(C);
  call.shape("Z", Z, d, -1);
  with_engine(call, precision, [&](auto engine) {
    using E = decltype(engine);
    using T = typename E::T;
    change<E>(call, call.matrices<T>(C), call.matrices<const T>(Z), d, columns(Z), alpha, 1.0, nullptr);
  });
}

}  // namespace rlsedit

RLSEDIT_IMPL(downdate_)
