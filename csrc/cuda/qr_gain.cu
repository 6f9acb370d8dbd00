// qr_gain(R, K) -> R^-1 R^-T K': X R = K from the first block column on, then gain' R' = X from the last back
//
// One launch a block column c of 32; block 0 corrects the next one and solves it at once, a row a thread, the
// others correct 64 columns each:
//     forth:  X_c = K_c R_cc^-1,  K_j <- K_j - X_c R_cj  (j > c)
//     back:   Y_c = X_c R_cc^-T,  X_j <- X_j - Y_c R_jc' (j < c)
// Bytes: d^2 of R (each triangle's half twice), d / 32 times the rows; flops 2 d^2 u; 2 d / 32 launches.
#include "copy.h"
#include "gather.h"
#include "tensors.h"
#include "triangle.h"

namespace rlsedit {
namespace {

constexpr int kRows = 128, kThreads = 256, kWidth = 64;

template <class T>
constexpr int kTurnedLd = kWidth + 32 / int(sizeof(T));
template <class T>
constexpr int kBlock = greater(kWidth * kTileLd, kSide* kTurnedLd<T>);
template <class T>
constexpr size_t kBytes = (kRows * kTileLd + kBlock<T> + kTileSize + kRows * kTileLd) * sizeof(T);

// Columns [first, first + 8 NT) below `last`: f(row, column, what is to be subtracted). solved: X_c in
// shared memory.
template <class E, bool BACK, int NT, class F>
RLSEDIT_DEVICE void correction(const Matrix<const typename E::T>& R, const typename E::T* solved,
                               typename E::T* block, int64_t c, int64_t first, int64_t last, int64_t d,
                               const F& f) {
  using T = typename E::T;
  if constexpr (BACK)
    copy_tile<kSide, kTileLd, kThreads>(block, 8 * NT, R, wide(R), first, c, last, d);
  else
    copy_tile<8 * NT, kTurnedLd<T>, kThreads>(block, kSide, R, wide(R), c, first, d, last);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  T sum[1][NT][4];
  clear(sum);
  const int m = 16 * warp_index();
  multiply<E, 1, NT, !BACK>(sum, solved + m * kTileLd, kTileLd, block, BACK ? kTileLd : kTurnedLd<T>, kSide);
  for_each_sum(sum, [&](int i, int j, T value) { f(m + i, j, value); });
}

// row <- row D^-1 (or D^-T, from the last element back) for an upper triangular D with 1 / D[k][k] in
// column 32.
template <bool BACK, class T>
RLSEDIT_DEVICE void substitute(T* row, const T* D) {
  T x[kSide];
#pragma unroll
  for (int j = 0; j < kSide; ++j) x[j] = row[j];
#pragma unroll
  for (int step = 0; step < kSide; ++step) {
    const int j = BACK ? kSide - 1 - step : step;
    x[j] *= D[j * kTileLd + kSide];
#pragma unroll
    for (int c = 0; c < kSide; ++c) {
      if (!BACK && c > j) x[c] -= x[j] * D[j * kTileLd + c];
      if (BACK && c < j) x[c] -= x[j] * D[c * kTileLd + j];
    }
  }
#pragma unroll
  for (int j = 0; j < kSide; ++j) row[j] = x[j];
}

// After block column `solved_at` (none where it is outside of [0, d)): block 0 corrects and solves the next
// one, the others correct what is further on. X (b, u, d) contiguous; gain (b, d, u), written on the way
// back.
template <class E, bool BACK>
__global__ void __launch_bounds__(kThreads)
    sweep_kernel(Matrices<const typename E::T> Rs, typename E::T* Xs, typename E::T* gains, int64_t solved_at,
                 int64_t next, int64_t d, int64_t u) {
  using T = typename E::T;
  const int64_t b = blockIdx.z, row = static_cast<int64_t>(blockIdx.y) * kRows, block = blockIdx.x;
  const Matrix<const T> R = Rs[b];
  T *X = Xs + b * u * d, *solved = shared_memory<T>(), *right = solved + kRows * kTileLd,
    *D = right + kBlock<T>, *own = D + kTileSize;
  const Matrix<const T> from{X, d, 1};
  const bool corrects = solved_at >= 0 && solved_at < d;
  if (corrects) copy_tile<kSide, kTileLd, kThreads>(solved, kRows, from, wide(from), row, solved_at, u, d);
  if (block > 0) {
    const int64_t begin = BACK ? 0 : next + kSide, last = BACK ? next : d,
                  first = begin + (block - 1) * kWidth;
    correction<E, BACK, kWidth / 8>(R, solved, right, solved_at, first, last, d, [&](int i, int j, T value) {
      if (row + i < u && first + j < last) X[(row + i) * d + first + j] -= value;
    });
    return;
  }
  const int64_t last = lesser<int64_t>(next + kSide, d);
  copy_tile<kSide, kTileLd, kThreads>(own, kRows, from, wide(from), row, next, u, d);
  for (int i = static_cast<int>(threadIdx.x); i < kSide * kSide; i += kThreads) {
    const int r = i / kSide, c = i % kSide;
    const T outside = r == c ? T(1) : T(0);
    const T value = c >= r && next + c < d ? R.at(next + r, next + c) : outside;
    D[r * kTileLd + c] = value;
    if (r == c) D[r * kTileLd + kSide] = T(1) / value;
  }
  if (corrects) {
    correction<E, BACK, kSide / 8>(R, solved, right, solved_at, next, last, d,
                                   [&](int i, int j, T value) { own[i * kTileLd + j] -= value; });
  } else {
    copy_commit();
    copy_wait<0>();
  }
  __syncthreads();
  if (threadIdx.x < kRows) substitute<BACK>(own + threadIdx.x * kTileLd, D);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kSide; i += kThreads) {
    const int r = i / kSide, c = i % kSide;
    if (row + r < u && next + c < d) X[(row + r) * d + next + c] = own[r * kTileLd + c];
  }
  if constexpr (BACK) {
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kSide; i += kThreads) {
      const int r = i % kRows, c = i / kRows;
      if (row + r < u && next + c < d) gains[b * d * u + (next + c) * u + row + r] = own[r * kTileLd + c];
    }
  }
}

template <class E>
void form_gain(Call& call, Matrices<const typename E::T> R, Matrices<const typename E::T> K, int64_t d,
               int64_t u, typename E::T* gain) {
  using T = typename E::T;
  const int64_t batch = call.batch(), last = (ceil_div(d, kSide) - 1) * kSide;
  call.require(static_cast<int64_t>(kBytes<T>) <= call.most_shared(),
               "this GPU has too little shared memory");
  T* X = call.scratch<T>(batch * u * d);
  gather(call.stream(), batch, K, 0, X, u, d);
  const auto step = [&](auto kernel, int64_t solved_at, int64_t next, int64_t others) {
    const dim3 grid(static_cast<unsigned>(1 + ceil_div(others, kWidth)),
                    static_cast<unsigned>(ceil_div(u, kRows)), static_cast<unsigned>(batch));
    launch(kernel, grid, kThreads, kBytes<T>, call.stream(), R, X, gain, solved_at, next, d, u);
  };
  step(sweep_kernel<E, false>, -1, 0, 0);
  for (int64_t next = kSide; next < d; next += kSide)
    step(sweep_kernel<E, false>, next - kSide, next, greater<int64_t>(d - next - kSide, 0));
  step(sweep_kernel<E, true>, d, last, 0);
  for (int64_t next = last - kSide; next >= 0; next -= kSide)
    step(sweep_kernel<E, true>, next + kSide, next, next);
}

}  // namespace

Tensor qr_gain(Tensor R, Tensor K, int64_t precision) {
  Call call("qr_gain", "R", R);
  call.square("R", R);
  call.floating("K", K);
  const int64_t d = columns(R), u = rows(K);
  call.shape("K", K, -1, d);
  Tensor gain = call.empty({d, u});
  with_engine(call, precision, [&](auto engine) {
    using E = decltype(engine);
    using T = typename E::T;
    form_gain<E>(call, call.matrices<const T>(R), call.matrices<const T>(K), d, u, data<T>(gain));
  });
  return gain;
}

}  // namespace rlsedit

RLSEDIT_IMPL(qr_gain)
