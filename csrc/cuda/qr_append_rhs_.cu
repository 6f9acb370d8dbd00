// qr_append_rhs_(R, B, K, V): [R B] <- top of Q'[R B; K V], one launch, ordered by data flow (dataflow.h)
//
//      ticket: 0  1  2 ..     panels ..        a ticket owns 32 columns of R, or of B, and the batch's rows
//      +---+---+---+---+   +---+---+           there, which stay in shared memory. From the top down, for
//      | \ | 0 | 0 | 0 |   | 0 | 0 |           every panel p before its own:
//      +---+---+---+---+   +---+---+             its 32 x 32 tile of R in the rows of p (asked for ahead),
//          | \ | 1 | 1 |   | 1 | 1 |             wait until p is reduced, its block reflector (L2 cache),
//          +---+---+---+   +---+---+             D = L (W + R) + tau W - tau |y|^2 R,  W = X'K
//              | \ | 2 |   | 2 | 2 |             R <- R + D,  K <- K - X (2 R + D)
//              +---+---+   +---+---+           then a panel reduces its own tile (reflectors.h) and says so.
//
// Up to 128 rows at a time, more go in one launch after the other. Bytes: d^2 of R (its upper half, read and
// written, in float32 4 d^2) and 2 d v of B once, the rows once; d / 32 block reflectors of 5216 elements
// (9.3 MB for d = 14336 in float32), read from the second-level cache by every ticket behind them. Flops
// 2 d u (d + 2 v). The critical path goes from panel to panel, d / 32 of them, in cycles of 1.75 GHz:
//     1800 the count seen by the next one   1500 its block reflector loaded     1900 three small products
//     12800 32 column steps of 400          1200 written and made visible
// about 19000, 11 us.
#include "qr_append_rhs_.h"

#include "reflectors.h"

namespace rlsedit {
namespace {

// Shared memory of a block.
template <class T>
struct Room {
  static constexpr int kTurnedLd = kPanel + 8;  // read along its first index without bank conflicts
  T* memory;

  RLSEDIT_DEVICE T* rows() const { return memory; }                   // K' (32 columns, kRowsLd apart)
  RLSEDIT_DEVICE T* x() const { return memory + kPanel * kRowsLd; }   // X' alike
  RLSEDIT_DEVICE T* l() const { return x() + kPanel * kRowsLd; }      // L' (32, 32)
  RLSEDIT_DEVICE T* top() const { return l() + kPanel * kTurnedLd; }  // rows of R (32, 32)
  RLSEDIT_DEVICE T* both() const { return top() + kTileSize; }        // (W + R)', then (2 R + D)'
  RLSEDIT_DEVICE T* vectors() const { return both() + kTileSize; }    // signs, tau, tau |y|^2
  static constexpr int kElements = 2 * kPanel * kRowsLd + kPanel * kTurnedLd + 2 * kTileSize + 3 * kPanel;
};
static_assert(kReflectRoom <= kPanel * kRowsLd, "a panel is reduced with its columns where X' was");

// The 32 columns of a ticket.
template <class T>
struct Columns {
  Matrix<T> A;  // R or B
  int64_t first, height, last;

  // Its tile in rows [row, row + 32) on the way to shared memory.
  RLSEDIT_DEVICE void fetch(T* tile, int64_t row) const {
    const Matrix<const T> from{A.data, A.rs, A.cs};
    copy_tile<kPanel, kTileLd, kQrThreads>(tile, kPanel, from, wide(from), row, first, height, last);
    copy_commit();
  }
};

// The batch's rows [row, row + count) in the ticket's columns, turned; zeros beyond. All are asked for before
// the first is waited for.
template <class T>
RLSEDIT_DEVICE void load_rows(T* to, const Matrix<const T>& from, int64_t row, int64_t count, int64_t first,
                              int64_t last) {
  constexpr int kEach = kMostRows * kPanel / kQrThreads;
  const bool down = from.rs == 1 && from.cs != 1;  // threads side by side read adjacent elements
  const auto for_each = [&](const auto& f) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int i = static_cast<int>(threadIdx.x) + k * kQrThreads;
      f(k, down ? i % kMostRows : i / kPanel, down ? i / kMostRows : i % kPanel);
    }
  };
  T value[kEach];
  for_each([&](int k, int r, int c) {
    value[k] = r < count && first + c < last ? from.at(row + r, first + c) : T(0);
  });
  for_each([&](int k, int r, int c) { to[c * kRowsLd + r] = value[k]; });
}

template <class T>
RLSEDIT_DEVICE void load_reflector(const Room<T>& room, const Reflector<T>& h) {
  copy_tile<kMostRows, kRowsLd, kQrThreads>(room.x(), kPanel, Matrix<const T>{h.x(), kMostRows, 1}, true, 0,
                                            0, kPanel, kMostRows);
  copy_tile<kPanel, Room<T>::kTurnedLd, kQrThreads>(room.l(), kPanel, Matrix<const T>{h.l(), kPanel, 1}, true,
                                                    0, 0, kPanel, kPanel);
  copy_tile<kPanel, kPanel, kQrThreads>(room.vectors(), 3, Matrix<const T>{h.sign(), kPanel, 1}, true, 0, 0,
                                        3, kPanel);
  copy_commit();
}

// The block reflector in `room` applied to the ticket's tile in rows [row, row + 32), which goes back to
// global memory, and to its rows. `ahead()`: called when the tile has been read. tall: rows of the batch, in
// 32s.
template <class E, class F>
RLSEDIT_DEVICE void correct(const Room<typename E::T>& room, const Columns<typename E::T>& own, int64_t row,
                            int tall, const F& ahead) {
  using T = typename E::T;
  const T *sign = room.vectors(), *tau = sign + kPanel, *shrink = tau + kPanel;
  T* both = room.both();
  const int m = 16 * (warp_index() & 1), n = 8 * (warp_index() >> 1);
  T W[1][1][4], D[1][1][4], old[4];
  clear(W);
  clear(D);
  deep_product<E, 1, 4, false>(W, room.rows() + m * kRowsLd, kRowsLd, room.x() + n * kRowsLd, kRowsLd, tall);
  int k = 0;
  for_each_sum(W, [&](int i, int j, T value) {
    const int c = m + i, r = n + j;
    old[k] = room.top()[r * kTileLd + c] * sign[r];
    both[c * kTileLd + r] = value + old[k++];
  });
  __syncthreads();
  ahead();
  deep_product<E, 1, 4, true>(D, both + m * kTileLd, kTileLd, room.l() + n, Room<T>::kTurnedLd, kPanel);
  __syncthreads();  // W + R has been read
  k = 0;
  for_each_sum(D, [&](int i, int j, T value) {
    const int c = m + i, r = n + j;
    const T now = old[k] + (value + (tau[r] * W[0][0][k] - shrink[r] * old[k]));
    both[c * kTileLd + r] = old[k++] + now;
    if (row + r < own.height && own.first + c < own.last) own.A.at(row + r, own.first + c) = now;
  });
  __syncthreads();
  const int from = 32 * (warp_index() >> 1);
  if (from >= tall) return;
  T sum[1][4][4];
  clear(sum);
  deep_product<E, 4, 2, true>(sum, both + m * kTileLd, kTileLd, room.x() + from, kRowsLd, kPanel);
  for_each_sum(sum, [&](int i, int j, T value) { room.rows()[(m + i) * kRowsLd + from + j] -= value; });
}

// counters: the next ticket, then for every matrix how many panels are reduced. work: (batch, panels,
// reflector). Rows [row, row + count) of K and V.
template <class E>
__global__ void __launch_bounds__(kQrThreads, E::kBlocks)
    append_kernel(Matrices<typename E::T> Rs, Matrices<typename E::T> Bs, Matrices<const typename E::T> Ks,
                  Matrices<const typename E::T> Vs, typename E::T* work, unsigned* counters, int64_t d,
                  int64_t v, int64_t row, int64_t count, unsigned batch, unsigned panels) {
  using T = typename E::T;
  const Room<T> room{shared_memory<T>()};
  const unsigned ticket = take_ticket(counters, reinterpret_cast<unsigned*>(room.memory));
  const unsigned b = ticket % batch, turn = ticket / batch;
  const bool of_rhs = turn >= panels;
  const unsigned steps = of_rhs ? panels : turn;
  unsigned* done = counters + (1 + b) * kCounterSize;
  T* reflectors = work + b * panels * Reflector<T>::kSize;
  const Matrix<T> A = of_rhs ? Bs[b] : Rs[b];
  const Matrix<const T> rows = of_rhs ? Vs[b] : Ks[b];
  const Columns<T> own{{in_global(A.data), A.rs, A.cs},
                       static_cast<int64_t>(of_rhs ? turn - panels : turn) * kPanel,
                       d,
                       of_rhs ? v : d};
  own.fetch(room.top(), 0);
  load_rows(room.rows(), Matrix<const T>{in_global(rows.data), rows.rs, rows.cs}, row, count, own.first,
            own.last);
  const int tall = static_cast<int>(ceil_div(count, 32) * 32);
  Awaited reduced(done);
  for (unsigned p = 0; p < steps; ++p) {
    reduced.wait(p + 1, p + 1 == turn);
    load_reflector(room, Reflector<T>{reflectors + p * Reflector<T>::kSize});
    copy_wait<0>();
    __syncthreads();
    correct<E>(room, own, static_cast<int64_t>(p) * kPanel, tall, [&] {
      if (p + 1 < panels) own.fetch(room.top(), static_cast<int64_t>(p + 1) * kPanel);
    });
  }
  if (of_rhs) return;
  copy_wait<0>();
  __syncthreads();
  T* tile = room.top();
  reflect(tile, room.rows(), room.x(), Reflector<T>{reflectors + turn * Reflector<T>::kSize});
  publish(done, turn + 1);
  for (int i = static_cast<int>(threadIdx.x); i < kPanel * kPanel; i += kQrThreads) {
    const int r = i / kPanel, c = i % kPanel;
    if (c >= r && own.first + c < d) own.A.at(own.first + r, own.first + c) = tile[r * kTileLd + c];
  }
}

}  // namespace

template <class E>
void append(Call& call, Matrices<typename E::T> R, Matrices<typename E::T> B, Matrices<const typename E::T> K,
            Matrices<const typename E::T> V, int64_t d, int64_t u, int64_t v) {
  using T = typename E::T;
  constexpr size_t kBytes = sizeof(T) * Room<T>::kElements;
  const int64_t batch = call.batch(), panels = ceil_div(d, kPanel), rhs = ceil_div(v, kPanel);
  call.require(static_cast<int64_t>(kBytes) <= call.most_shared(), "this GPU has too little shared memory");
  call.require(batch * (panels + rhs) < (int64_t(1) << 31), "too many matrices of this size at once");
  T* work = call.scratch<T>(batch * panels * Reflector<T>::kSize);
  const Counters counters(call, 1 + batch);
  for (int64_t first = 0; first < u; first += kMostRows) {
    launch(append_kernel<E>, dim3(static_cast<unsigned>(batch * (panels + rhs))), kQrThreads, kBytes,
           call.stream(), R, B, K, V, work, counters.cleared(), d, v, first,
           lesser<int64_t>(kMostRows, u - first), static_cast<unsigned>(batch),
           static_cast<unsigned>(panels));
  }
}

#define RLSEDIT_INSTANTIATE(E)                                                                               \
  template void append<E>(Call&, Matrices<E::T>, Matrices<E::T>, Matrices<const E::T>, Matrices<const E::T>, \
                          int64_t, int64_t, int64_t);
RLSEDIT_INSTANTIATE(Tf32x3)
RLSEDIT_INSTANTIATE(Ffma)
RLSEDIT_INSTANTIATE(Dmma)
#undef RLSEDIT_INSTANTIATE

void qr_append_rhs_(Tensor R, Tensor B, Tensor K, Tensor V, int64_t precision) {
  Call call("qr_append_rhs_", "R", R);
  call.square("R", R);
  call.writable("R", R);
  call.floating("B", B);
  call.writable("B", B);
  call.floating("K", K);
  call.floating("V", V);
  const int64_t d = columns(R), u = rows(K), v = columns(B);
  call.shape("B", B, d, -1);
  call.shape("K", K, -1, d);
  call.shape("V", V, u, v);
  with_engine(call, precision, [&](auto engine) {
    using E = decltype(engine);
    using T = typename E::T;
    append<E>(call, call.matrices<T>(R), call.matrices<T>(B), call.matrices<const T>(K),
              call.matrices<const T>(V), d, u, v);
  });
}

}  // namespace rlsedit

RLSEDIT_IMPL(qr_append_rhs_)
