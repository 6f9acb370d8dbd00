// qr_gain(R, K) -> R^-1 R^-T K': X R = K from the first block column on, then gain' R' = X from the last back
//
//      ticket: 0  1  2 ..     One launch forth and one back, each ordered by data flow (dataflow.h). A ticket
//      +---+---+---+---+      owns 64 (float64: 32) columns j of X and 64 keys; keys of another group are
//      | D | R | R | R |      a chain of their own. For every block column p before its own: the tile of R
//      +---+---+---+---+      (asked for one ahead), wait until p is solved, its X (second-level cache), then
//          | D | R | R |          forth:  X_j = (K_j - sum_p X_p R_pj) R_jj^-1      (p < j)
//          +---+---+---+          back:   Y_j = (X_j - sum_p Y_p R_jp') R_jj^-T     (p > j, from the last)
//              | D | R |      with the sum in registers. The diagonal tile is there before anything is waited
//              +---+---+      for, and is solved by substitution, a key a thread, 32 columns at a time.
//
// Bytes: d^2 of R (its upper half twice), for every 64 keys, though tickets side by side share it in the
// second-level cache; d u of K, of X three times and of the gain. Flops 2 d^2 u. The critical path is
// 2 d / 64 tickets, in cycles of 1.75 GHz:
//     1800 the count seen by the next one   1400 its X loaded      700 the product      900 two substitutions
//     300 the product between them          900 written and made visible
// about 6000, 3.4 us.
#include "copy.h"
#include "dataflow.h"
#include "deep_product.h"
#include "tensors.h"
#include "triangle.h"

namespace rlsedit {
namespace {

constexpr int kKeys = 64, kThreads = 256;
template <class T>
constexpr int kColumns = sizeof(T) == 4 ? 64 : 32;

template <class T, bool BACK>
struct Room {
  static constexpr int kWide = kColumns<T>;
  static constexpr int kLd = kWide + 4;  // X: read along its second index without bank conflicts
  static constexpr int kRLd =
      kWide + (BACK ? 4 : 8);  // a tile of R: along its second index back, first forth
  static constexpr int kDLd = kWide + 8;
  T* memory;

  RLSEDIT_DEVICE T* own() const { return memory; }                         // what the ticket owns
  RLSEDIT_DEVICE T* solved() const { return memory + kKeys * kLd; }        // X_p or Y_p
  RLSEDIT_DEVICE T* diagonal() const { return memory + 2 * kKeys * kLd; }  // R_jj; back: turned
  RLSEDIT_DEVICE T* over() const { return diagonal() + kWide * kDLd; }     // 1 / its diagonal
  RLSEDIT_DEVICE T* tile(unsigned p) const {                               // R_pj or R_jp
    return over() + kWide + (p & 1) * kWide * kRLd;
  }
  static constexpr int kElements = 2 * kKeys * kLd + kWide * (kDLd + 1 + 2 * kRLd);
};

// row <- row D^-1 for a triangle D of 32, upper, or, BACK, lower (from the last element back); `over`: 1 /
// D[j][j]. What an element loses to others is summed from zero and taken off once: with a factor near the
// identity the sums are small, and taking them off term by term would round 32 times at full size.
template <bool BACK, class T>
RLSEDIT_DEVICE void substitute(T* row, const T* D, int ld, const T* over) {
  using W = Wide<T>;
  T x[kSide], lost[kSide];
#pragma unroll
  for (int j = 0; j < kSide; j += W::kCount) {
    const W some = *reinterpret_cast<const W*>(row + j);
#pragma unroll
    for (int k = 0; k < W::kCount; ++k) x[j + k] = some.v[k];
  }
#pragma unroll
  for (int step = 0; step < kSide; ++step) {
    const int j = BACK ? kSide - 1 - step : step;
    x[j] = (step == 0 ? x[j] : x[j] - lost[j]) * over[j];
#pragma unroll
    for (int c = 0; c < kSide; ++c)
      if (BACK ? c < j : c > j) lost[c] = step == 0 ? x[j] * D[j * ld + c] : lost[c] + x[j] * D[j * ld + c];
  }
#pragma unroll
  for (int j = 0; j < kSide; j += W::kCount) {
    W some;
#pragma unroll
    for (int k = 0; k < W::kCount; ++k) some.v[k] = x[j + k];
    *reinterpret_cast<W*>(row + j) = some;
  }
}

// own <- own D^-1 (back: D'^-1), in 32s.
template <class E, bool BACK>
RLSEDIT_DEVICE void solve(const Room<typename E::T, BACK>& room) {
  using T = typename E::T;
  using In = Room<T, BACK>;
  constexpr int kParts = In::kWide / kSide;
#pragma unroll
  for (int step = 0; step < kParts; ++step) {
    const int s = kSide * (BACK ? kParts - 1 - step : step);
    if (threadIdx.x < kKeys)
      substitute<BACK>(room.own() + threadIdx.x * In::kLd + s, room.diagonal() + s * In::kDLd + s, In::kDLd,
                       room.over() + s);
    __syncthreads();
    if (step + 1 == kParts) return;
    const int next = BACK ? s - kSide : s + kSide;  // two parts at most: one is left
    const int m = 16 * (warp_index() & 3), n = next + 16 * (warp_index() >> 2);
    T sum[1][2][4];
    clear(sum);
    deep_product<E, 2, 4, true>(sum, room.own() + m * In::kLd + s, In::kLd,
                                room.diagonal() + s * In::kDLd + n, In::kDLd, kSide);
    for_each_sum(sum, [&](int i, int j, T value) { room.own()[(m + i) * In::kLd + n + j] -= value; });
    __syncthreads();
  }
}

// X: (batch, groups of keys, blocks, kKeys, kColumns), written forth, changed back. counters: the next
// ticket, then for every batch and group how many blocks are solved. gain (batch, d, u): written on the way
// back.
template <class E, bool BACK>
__global__ void __launch_bounds__(kThreads, E::kBlocks)
    sweep_kernel(Matrices<const typename E::T> Rs, Matrices<const typename E::T> Ks, typename E::T* X,
                 typename E::T* gain, unsigned* counters, int64_t d, int64_t u, unsigned chains,
                 unsigned groups, unsigned blocks) {
  using T = typename E::T;
  using In = Room<T, BACK>;
  constexpr int kWide = In::kWide, kTiles = kWide / 16, kSlot = kKeys * kWide;
  const In room{shared_memory<T>()};
  const unsigned ticket = take_ticket(counters, reinterpret_cast<unsigned*>(room.memory));
  const unsigned chain = ticket % chains, turn = ticket / chains;
  const int64_t b = chain / groups, key = static_cast<int64_t>(chain % groups) * kKeys;
  const auto column_of = [&](unsigned p) { return static_cast<int64_t>(BACK ? blocks - 1 - p : p) * kWide; };
  const auto slot_of = [&](unsigned p) {
    return X + (static_cast<int64_t>(chain) * blocks + (BACK ? blocks - 1 - p : p)) * kSlot;
  };
  const int64_t column = column_of(turn);
  const Matrix<const T> R = Rs[b];
  const auto fetch = [&](unsigned p) {
    if (p < turn)
      copy_tile<kWide, In::kRLd, kThreads>(room.tile(p), kWide, R, wide(R), BACK ? column : column_of(p),
                                           BACK ? column_of(p) : column, d, d);
    copy_commit();
  };
  fetch(0);
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kWide * kWide; i += kThreads) {
    // Back, the block is turned: a warp takes 4 rows of 8 columns, whole sectors, to 16 banks.
    const int r = BACK ? i / (4 * kWide) * 4 + i / 8 % 4 : i / kWide;
    const int c = BACK ? i / 32 % (kWide / 8) * 8 + i % 8 : i % kWide;
    const T outside = r == c ? T(1) : T(0);
    const T value = c >= r && column + c < d ? R.at(column + r, column + c) : outside;
    room.diagonal()[BACK ? c * In::kDLd + r : r * In::kDLd + c] = value;
    if (r == c) room.over()[r] = T(1) / value;
  }
  const int m = 16 * (warp_index() & 3), n = kWide / 2 * (warp_index() >> 2);
  T sum[1][kTiles][4];  // what is taken off the ticket's own part, once
  clear(sum);
  {
    const Matrix<const T> given = BACK ? Matrix<const T>{slot_of(turn), kWide, 1} : Ks[b];
    const int64_t first_row = BACK ? 0 : key, first = BACK ? 0 : column;
    const int64_t rows = BACK ? kKeys : u, columns = BACK ? kWide : d;
    for_each_sum(sum, [&](int i, int j, T) {  // read again by this thread alone, until all meet
      const int64_t r = first_row + m + i, c = first + n + j;
      room.own()[(m + i) * In::kLd + n + j] = r < rows && c < columns ? given.at(r, c) : T(0);
    });
  }
  unsigned* done = counters + (1 + chain) * kCounterSize;
  Awaited solved(done);
  for (unsigned p = 0; p < turn; ++p) {
    solved.wait(p + 1, p + 1 == turn);
    copy_tile<kWide, In::kLd, kThreads>(room.solved(), kKeys, Matrix<const T>{slot_of(p), kWide, 1}, true, 0,
                                        0, kKeys, kWide);
    copy_commit();
    fetch(p + 1);
    copy_wait<1>();  // all but the tile that comes next
    __syncthreads();
    T part[1][kTiles][4];  // from zero: a long sum in parts rounds less than term by term
    clear(part);
    deep_product<E, kTiles, 2, !BACK>(part, room.solved() + m * In::kLd, In::kLd,
                                      room.tile(p) + place<!BACK>(n, 0, In::kRLd), In::kRLd, kWide);
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[0][k][i] += part[0][k][i];
  }
  copy_wait<0>();
  for_each_sum(sum, [&](int i, int j, T value) { room.own()[(m + i) * In::kLd + n + j] -= value; });
  __syncthreads();
  solve<E, BACK>(room);
  T* slot = slot_of(turn);
  for (int i = static_cast<int>(threadIdx.x); i < kSlot; i += kThreads)
    slot[i] = room.own()[i / kWide * In::kLd + i % kWide];
  publish(done, turn + 1);
  if constexpr (BACK) {
    for (int i = static_cast<int>(threadIdx.x); i < kSlot; i += kThreads) {
      const int r = i % kKeys, c = i / kKeys;
      if (key + r < u && column + c < d)
        gain[b * d * u + (column + c) * u + key + r] = room.own()[r * In::kLd + c];
    }
  }
}

template <class E>
void form_gain(Call& call, Matrices<const typename E::T> R, Matrices<const typename E::T> K, int64_t d,
               int64_t u, typename E::T* gain) {
  using T = typename E::T;
  const int64_t groups = ceil_div(u, kKeys), chains = call.batch() * groups,
                blocks = ceil_div(d, kColumns<T>);
  call.require(chains * blocks < (int64_t(1) << 31), "too many matrices of this size at once");
  T* X = call.scratch<T>(chains * blocks * kKeys * kColumns<T>);
  const Counters counters(call, 1 + chains);
  const auto sweep = [&](auto kernel, size_t elements) {
    const size_t bytes = elements * sizeof(T);
    call.require(static_cast<int64_t>(bytes) <= call.most_shared(), "this GPU has too little shared memory");
    launch(kernel, dim3(static_cast<unsigned>(chains * blocks)), kThreads, bytes, call.stream(), R, K, X,
           gain, counters.cleared(), d, u, static_cast<unsigned>(chains), static_cast<unsigned>(groups),
           static_cast<unsigned>(blocks));
  };
  sweep(sweep_kernel<E, false>, Room<T, false>::kElements);
  sweep(sweep_kernel<E, true>, Room<T, true>::kElements);
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
