// qr_append_rhs_(R, B, K, V): [R B] <- top of Q'[R B; K V], panel by panel, one launch a panel
//
//    panel p (32 rows of R)      block 0: columns of panel p + 1 are corrected, then reduced (look-ahead)
//      +----+----+---------+     others:  64 (float64: 32) of the columns behind it, or of B, are corrected
//      |  p |  0 | 1 2 ... |
//      +----+----+---------+     correction (reflectors.h):
//           | p+1|                  D = (X S)'K - E R,  K <- K - X (2 R + D),  R <- R + D
//
// Up to 128 rows at a time, more go in one after the other. Bytes: d^2 of R and 2 d v of B once, d / 32 times
// the rows, which stay in the second-level cache; flops 2 d u (d + 2 v). The critical path is d / 32 launches
// of 32 column steps, of one barrier each; the launches can be captured in a graph.
#include "qr_append_rhs_.h"

#include "gather.h"
#include "reflectors.h"

namespace rlsedit {
namespace {

template <class T>
constexpr int kWidth = sizeof(T) == 4 ? 64 : 32;

// In shared memory: the reflector, the batch's rows, and rows of R: before, and the sum of before and after.
template <class T, int WIDTH>
struct Room {
  static constexpr int kLd = WIDTH + 32 / int(sizeof(T));
  T *batch, *top, *both, *xs, *e, *x;

  RLSEDIT_DEVICE explicit Room(T* memory)
      : batch(memory),
        top(batch + kMostRows * kLd),
        both(top + kPanel * kLd),
        xs(both + kPanel * kLd),
        e(xs + kPanel * kRowsLd),
        x(e + kTileSize) {}
  static constexpr int kElements =
      (kMostRows + 2 * kPanel) * kLd + kPanel * kRowsLd + kTileSize + kMostRows * kTileLd;
};

// Columns [first, first + WIDTH) below `last` of rows [top_row, top_row + 32) of A, and of the batch's rows:
// A is corrected in global memory, f(row, column, value) takes the rows' new elements.
template <class E, int WIDTH, class F>
RLSEDIT_DEVICE void correct(const Matrix<typename E::T>& A, const Matrix<const typename E::T>& rows,
                            const Reflector<typename E::T>& h, const Room<typename E::T, WIDTH>& room,
                            int64_t top_row, int64_t height, int64_t first, int64_t last, int64_t u,
                            const F& f) {
  using T = typename E::T;
  constexpr int kLd = Room<T, WIDTH>::kLd;
  const int tall = static_cast<int>(ceil_div(u, 16) * 16);
  copy_tile<WIDTH, kLd, kQrThreads>(room.batch, tall, rows, wide(rows) && first % 4 == 0, 0, first, u, last);
  copy_tile<kMostRows, kRowsLd, kQrThreads>(room.xs, kPanel, Matrix<const T>{h.xs(), kMostRows, 1}, true, 0,
                                            0, kPanel, kMostRows);
  copy_tile<kPanel, kTileLd, kQrThreads>(room.e, kPanel, Matrix<const T>{h.e(), kPanel, 1}, true, 0, 0,
                                         kPanel, kPanel);
  copy_tile<kPanel, kTileLd, kQrThreads>(room.x, tall, Matrix<const T>{h.x(), kPanel, 1}, true, 0, 0, tall,
                                         kPanel);
  copy_commit();
  for (int i = static_cast<int>(threadIdx.x); i < kPanel * WIDTH; i += kQrThreads) {
    const int r = i / WIDTH, c = i % WIDTH;
    const bool inside = top_row + r < height && first + c < last;
    room.top[r * kLd + c] = inside ? A.at(top_row + r, first + c) * h.sign()[r] : T(0);
  }
  copy_wait<0>();
  __syncthreads();
  {
    constexpr int kTiles = WIDTH / 32;
    const int m = 16 * (warp_index() & 1), n = 8 * kTiles * (warp_index() >> 1);
    T up[1][kTiles][4], down[1][kTiles][4];
    clear(up);
    clear(down);
    multiply<E, 1, kTiles, true>(up, room.xs + m * kRowsLd, kRowsLd, room.batch + n, kLd, tall);
    multiply<E, 1, kTiles, true>(down, room.e + m * kTileLd, kTileLd, room.top + n, kLd, kPanel);
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) up[0][k][i] -= down[0][k][i];
    for_each_sum(up, [&](int i, int j, T value) {
      const int r = m + i, c = n + j;
      const T old = room.top[r * kLd + c], now = old + value;
      room.both[r * kLd + c] = old + now;
      if (top_row + r < height && first + c < last) A.at(top_row + r, first + c) = now;
    });
  }
  __syncthreads();
  for (int m = 16 * warp_index(); m < tall; m += 16 * kQrWarps) {
    T sum[1][WIDTH / 8][4];
    clear(sum);
    multiply<E, 1, WIDTH / 8, true>(sum, room.x + m * kTileLd, kTileLd, room.both, kLd, kPanel);
    for_each_sum(sum, [&](int i, int j, T value) { f(m + i, j, room.batch[(m + i) * kLd + j] - value); });
  }
}

// The panel of columns [column, column + 32), whose rows of the batch lie in `rows` (kLd apart, zero beyond
// u and d).
template <class T, int LD>
RLSEDIT_DEVICE void reduce_panel(const Matrix<T>& R, const T* rows, const Room<T, kPanel>& room,
                                 int64_t column, int64_t d, const Reflector<T>& out) {
  T *A = room.both, *X = room.x, *reflectors = room.top;  // `top` and `both` are tiles here
  for (int i = static_cast<int>(threadIdx.x); i < kPanel * kPanel; i += kQrThreads) {
    const int r = i / kPanel, c = i % kPanel;
    A[r * kTileLd + c] = c >= r && column + c < d ? R.at(column + r, column + c) : T(0);
  }
  for (int i = static_cast<int>(threadIdx.x); i < kMostRows * kPanel; i += kQrThreads)
    X[i / kPanel * kTileLd + i % kPanel] = rows[i / kPanel * LD + i % kPanel];
  __syncthreads();
  T* sign = room.xs;  // free until X' is formed
  if (threadIdx.x < kPanel) {
    const int r = static_cast<int>(threadIdx.x);
    sign[r] = A[r * kTileLd + r] < T(0) ? T(-1) : T(1);
    out.sign()[r] = sign[r];
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kPanel * kPanel; i += kQrThreads)
    A[i / kPanel * kTileLd + i % kPanel] *= sign[i / kPanel];
  __syncthreads();
  reflect(A, X, kTileLd, room.xs + kPanel);
  for (int i = static_cast<int>(threadIdx.x); i < kPanel * kPanel; i += kQrThreads) {
    const int r = i / kPanel, c = i % kPanel;
    if (c >= r && column + c < d) R.at(column + r, column + c) = A[r * kTileLd + c];
  }
  form_reflector(X, room.xs, reflectors, room.e, out);
}

// Step `panel`: block 0 takes the next panel, 1 to `blocks` the columns of R behind it, the rest those of B.
// rows (b, u, d) and targets (b, u, v) contiguous; work (b, 2, reflector): of this panel and of the next.
// Panel -1: nothing to apply yet.
template <class E>
__global__ void __launch_bounds__(kQrThreads)
    append_kernel(Matrices<typename E::T> Rs, Matrices<typename E::T> Bs, typename E::T* all_rows,
                  typename E::T* all_targets, typename E::T* work, int panel, int blocks, int64_t d,
                  int64_t v, int64_t u) {
  using T = typename E::T;
  constexpr int kLd = Room<T, kPanel>::kLd;
  const int64_t b = blockIdx.z, block = blockIdx.x, top_row = static_cast<int64_t>(panel) * kPanel;
  T *rows = all_rows + b * u * d, *memory = shared_memory<T>();
  const Reflector<T> here{work + (2 * b + (panel & 1)) * Reflector<T>::kSize};
  const Reflector<T> there{work + (2 * b + (~panel & 1)) * Reflector<T>::kSize};
  const Matrix<const T> from{rows, d, 1};
  if (block == 0) {
    const int64_t column = top_row + kPanel;
    if (column >= d) return;
    const Matrix<T> R = Rs[b];
    const Room<T, kPanel> room(memory);
    if (panel < 0) {
      copy_tile<kPanel, kLd, kQrThreads>(room.batch, kMostRows, from, wide(from), 0, 0, u, d);
      copy_commit();
      copy_wait<0>();
    } else {
      correct<E, kPanel>(R, from, here, room, top_row, d, column, d, u,
                         [&](int i, int j, T value) { room.batch[i * kLd + j] = value; });
      const int tall = static_cast<int>(ceil_div(u, 16) * 16);
      for (int i = static_cast<int>(threadIdx.x); i < (kMostRows - tall) * kPanel; i += kQrThreads)
        room.batch[(tall + i / kPanel) * kLd + i % kPanel] = T(0);
    }
    __syncthreads();
    reduce_panel<T, kLd>(R, room.batch, room, column, d, there);
    return;
  }
  constexpr int kAcross = kWidth<T>;
  const bool of_rhs = block > blocks;
  const int64_t first =
      of_rhs ? (block - 1 - blocks) * kAcross : top_row + 2 * kPanel + (block - 1) * kAcross;
  const int64_t last = of_rhs ? v : d;
  T* changed = of_rhs ? all_targets + b * u * v : rows;
  correct<E, kAcross>(of_rhs ? Bs[b] : Rs[b], Matrix<const T>{changed, last, 1}, here,
                      Room<T, kAcross>(memory), top_row, d, first, last, u, [&](int i, int j, T value) {
                        if (i < u && first + j < last) changed[i * last + first + j] = value;
                      });
}

}  // namespace

template <class E>
void append(Call& call, Matrices<typename E::T> R, Matrices<typename E::T> B, Matrices<const typename E::T> K,
            Matrices<const typename E::T> V, int64_t d, int64_t u, int64_t v) {
  using T = typename E::T;
  constexpr size_t kBytes = sizeof(T) * greater(Room<T, kWidth<T>>::kElements, Room<T, kPanel>::kElements);
  const int64_t batch = call.batch(), chunk = lesser<int64_t>(u, kMostRows);
  call.require(static_cast<int64_t>(kBytes) <= call.most_shared(), "this GPU has too little shared memory");
  T *rows = call.scratch<T>(batch * chunk * d),
    *targets = v > 0 ? call.scratch<T>(batch * chunk * v) : nullptr;
  T* work = call.scratch<T>(batch * 2 * Reflector<T>::kSize);
  const int panels = static_cast<int>(ceil_div(d, kPanel));
  for (int64_t first = 0; first < u; first += chunk) {
    const int64_t count = lesser(chunk, u - first);
    gather(call.stream(), batch, K, first, rows, count, d);
    if (v > 0) gather(call.stream(), batch, V, first, targets, count, v);
    for (int panel = -1; panel < panels - (v > 0 ? 0 : 1); ++panel) {
      const int64_t behind = greater<int64_t>(d - (panel + 2) * kPanel, 0);
      const int64_t blocks = panel < 0 ? 0 : ceil_div(behind, kWidth<T>);
      const int64_t others = panel < 0 ? 0 : ceil_div(v, kWidth<T>);
      launch(append_kernel<E>,
             dim3(static_cast<unsigned>(1 + blocks + others), 1, static_cast<unsigned>(batch)), kQrThreads,
             kBytes, call.stream(), R, B, rows, targets, work, panel, static_cast<int>(blocks), d, v, count);
    }
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
