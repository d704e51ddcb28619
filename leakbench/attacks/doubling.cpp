// A block of GRNN's generator, trial after trial: a 3 x 3 convolution of an image whose pixels are repeated twice each way,
// normalisation of its channels, and a gated linear unit; and its derivative.
//
// A trial has an image x [C][P] of P = H x H pixels and weights w [9][O][C]. With k a tap and an output, the products
// p[k] = sum over c of w[k][c] x[c] are all that is multiplied. ``spread`` adds those of each tap at their places of
//     u [O][2 H][2 W],  and then  z = (u - mean(u)) r,  r = 1 / sqrt(var(u) + eps),  y = gamma z + beta,
//     out[o] = y[o] g[o],  g[o] = sigmoid(y[o + O / 2]).
// u and z are kept as four images of H x H, [row's copy][column's copy][P], so that all sums are of whole registers: a
// neighbour is W or 1 numbers further on. P is a multiple of 16, and C of 32.
#include <vector>

#include "vectors.h"

#ifdef __AVX512F__  // 32 registers
constexpr int NARROW = 16, BROAD = 8, ROWS = 6, COLUMNS = 4, ACROSS = 2;
#else
constexpr int NARROW = 8, BROAD = 4, ROWS = 6, COLUMNS = 2, ACROSS = 1;
#endif
// 9 x ACROSS, NARROW x 1, BROAD x 2 and ROWS x COLUMNS: the tiles whose sums stay in registers.

struct Shape {
  long channels, outputs, height, width;
  long pixels() const { return height * width; }
  long apart() const { return pixels() + 2 * width; }  // of planes with a row of zeros before and behind
};

// out [9][P], planes within zeros: the products of one output. Channels are the inner loop.
template <class S, int N> static void products(const Shape& q, const S* w, const S* x, S* out) {
  constexpr int L = Lanes<S>::COUNT;
  const long apart = q.outputs * q.channels, pixels = q.pixels();
  for (long p = 0; p < pixels; p += N * L) {
    Vec<S> sum[9][N] = {};
    for (long c = 0; c < q.channels; c++) {
      Vec<S> pixel[N];
      EACH for (int n = 0; n < N; n++) pixel[n] = load<S>(x + c * pixels + p + n * L);
      _Pragma("GCC unroll 9") for (int k = 0; k < 9; k++)
        EACH for (int n = 0; n < N; n++) sum[k][n] += w[k * apart + c] * pixel[n];
    }
    for (int k = 0; k < 9; k++)
      for (int n = 0; n < N; n++) store<S>(out + k * q.apart() + p + n * L, sum[k][n]);
  }
}

// dx[c][p] = sum over the K = 9 O rows of w[k][c] d[k][p]. Rows are the inner loop.
template <class S, int M, int N> static void by_image(const Shape& q, const S* w, const S* d, S* dx) {
  constexpr int L = Lanes<S>::COUNT;
  const long rows = 9 * q.outputs, pixels = q.pixels();
  for (long c = 0; c < q.channels; c += M)
    for (long p = 0; p < pixels; p += N * L) {
      Vec<S> sum[M][N] = {};
      for (long k = 0; k < rows; k++) {
        Vec<S> row[N];
        EACH for (int n = 0; n < N; n++) row[n] = load<S>(d + k * pixels + p + n * L);
        _Pragma("GCC unroll 16") for (int m = 0; m < M; m++)
          EACH for (int n = 0; n < N; n++) sum[m][n] += w[k * q.channels + c + m] * row[n];
      }
      for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store<S>(dx + (c + m) * pixels + p + n * L, sum[m][n]);
    }
}

// dw[k][c] = sum over pixels of d[k][p] x[c][p], with x as [P][C]. Pixels are the inner loop.
template <class S, int N> static void by_weight(const Shape& q, const S* x, const S* d, S* dw) {
  constexpr int L = Lanes<S>::COUNT;
  const long rows = 9 * q.outputs, pixels = q.pixels();
  for (long k = 0; k < rows; k += ROWS)
    for (long c = 0; c < q.channels; c += N * L) {
      Vec<S> sum[ROWS][N] = {};
      for (long p = 0; p < pixels; p++) {
        Vec<S> across[N];
        EACH for (int n = 0; n < N; n++) across[n] = load<S>(x + p * q.channels + c + n * L);
        EACH for (int m = 0; m < ROWS; m++)
          EACH for (int n = 0; n < N; n++) sum[m][n] += d[(k + m) * pixels + p] * across[n];
      }
      for (int m = 0; m < ROWS; m++)
        for (int n = 0; n < N; n++) store<S>(dw + (k + m) * q.channels + c + n * L, sum[m][n]);
    }
}

template <class S> static void clear_column(const Shape& q, S* plane, long column) {
  for (long y = 0; y < q.height; y++) plane[y * q.width + column] = 0;
}

// u [4][P] of the products [9][P], planes within zeros, as are the ``spare`` three. A pixel's first copy sees the pixel
// before it by the first tap, and itself by the others; its second copy sees itself by the first two, and the pixel behind
// it by the last.
template <class S> static void spread(const Shape& q, const S* products, S* u, S* spare) {
  constexpr int L = Lanes<S>::COUNT;
  const long pixels = q.pixels(), apart = q.apart(), w = q.width;
  S *first = spare, *middle = first + apart, *last = middle + apart;
  for (int copy = 0; copy < 2; copy++, u += 2 * pixels) {
    for (int j = 0; j < 3; j++) {
      const S *above = products + j * apart - (copy ? 0 : w), *own = products + (3 + j) * apart;
      const S* below = products + (6 + j) * apart + (copy ? w : 0);
      for (long i = 0; i < pixels; i += L) store<S>(first + j * apart + i, load<S>(above + i) + load<S>(own + i) + load<S>(below + i));
    }
    for (long i = 0; i < pixels; i += L) {
      store<S>(u + i, load<S>(middle + i) + load<S>(last + i));
      store<S>(u + pixels + i, load<S>(first + i) + load<S>(middle + i));
    }
    clear_column(q, first, w - 1), clear_column(q, last, 0);
    for (long i = 0; i < pixels; i += L) {
      store<S>(u + i, load<S>(u + i) + load<S>(first + i - 1));
      store<S>(u + pixels + i, load<S>(u + pixels + i) + load<S>(last + i + 1));
    }
  }
}

// The adjoint of ``spread``: each tap's products [P], ``to_tap`` from each other, get the derivatives of all where they
// went. ``spare`` are eight planes within zeros.
template <class S> static void gather(const Shape& q, const S* du, S* products, long to_tap, S* spare) {
  constexpr int L = Lanes<S>::COUNT;
  const long pixels = q.pixels(), apart = q.apart(), w = q.width;
  S *even = spare + 6 * apart, *odd = even + apart;
  for (int copy = 0; copy < 2; copy++, du += 2 * pixels) {
    S *first = spare + 3 * copy * apart, *middle = first + apart, *last = middle + apart;
    for (long i = 0; i < pixels; i += L) {
      Vec<S> a = load<S>(du + i), b = load<S>(du + pixels + i);
      store<S>(even + i, a), store<S>(odd + i, b), store<S>(middle + i, a + b);
    }
    clear_column(q, even, 0), clear_column(q, odd, w - 1);
    for (long i = 0; i < pixels; i += L) {
      store<S>(first + i, load<S>(du + pixels + i) + load<S>(even + i + 1));
      store<S>(last + i, load<S>(du + i) + load<S>(odd + i - 1));
    }
  }
  for (int j = 0; j < 3; j++) {
    const S *a = spare + j * apart, *b = a + 3 * apart;
    S* to = products + j * to_tap;
    for (long i = 0; i < pixels; i += L) {
      store<S>(to + i, load<S>(b + i) + load<S>(a + i + w));
      store<S>(to + 3 * to_tap + i, load<S>(a + i) + load<S>(b + i));
      store<S>(to + 6 * to_tap + i, load<S>(a + i) + load<S>(b + i - w));
    }
  }
}

// The place in an image [2 H][2 W] of the pixels of one copy.
template <class F> static inline void places(const Shape& q, int copy, F&& each) {
  for (long y = 0; y < q.height; y++)
    for (long x = 0; x < q.width; x++) each(y * q.width + x, (2 * y + copy / 2) * 2 * q.width + 2 * x + copy % 2);
}

// u [n] becomes z, and r is returned.
template <class S> static S normalise(S* u, long n, S eps) {
  constexpr int L = Lanes<S>::COUNT;
  Vec<S> sum{}, square{};
  for (long i = 0; i < n; i += L) sum += load<S>(u + i);
  const S mean = total<S>(sum) / S(n);
  for (long i = 0; i < n; i += L) {
    Vec<S> gap = load<S>(u + i) - mean;
    square += gap * gap;
  }
  const S r = S(1) / std::sqrt(total<S>(square) / S(n) + eps);
  for (long i = 0; i < n; i += L) store<S>(u + i, (load<S>(u + i) - mean) * r);
  return r;
}

// The derivative d [n] by y becomes that by u, gamma r (d - mean(d) - z mean(d z)); those by gamma and beta are written.
template <class S> static void unnormalise(S* d, const S* z, long n, S gamma, S r, S* by_gamma, S* by_beta) {
  constexpr int L = Lanes<S>::COUNT;
  Vec<S> sum{}, dot{};
  for (long i = 0; i < n; i += L) sum += load<S>(d + i), dot += load<S>(d + i) * load<S>(z + i);
  *by_beta = total<S>(sum), *by_gamma = total<S>(dot);
  const S mean = *by_beta / S(n), slope = *by_gamma / S(n);
  for (long i = 0; i < n; i += L) store<S>(d + i, gamma * r * (load<S>(d + i) - mean - slope * load<S>(z + i)));
}

// Of a trial z [O][4 P], r [O] and g [O / 2][4 P] are kept, and out is [O / 2][2 H][2 W]. ``spare`` is that of ``zeros``.
template <class S>
static void forth(const Shape& q, const S* x, const S* w, const S* gamma, const S* beta, S eps, S* z, S* r, S* g, S* out,
                  S* spare) {
  constexpr int L = Lanes<S>::COUNT;
  const long pixels = q.pixels(), n = 4 * pixels, half = q.outputs / 2;
  S *sums = spare + q.width, *planes = sums + 9 * q.apart();
  for (long o = 0; o < q.outputs; o++) {
    if (pixels % (ACROSS * L) == 0)
      products<S, ACROSS>(q, w + o * q.channels, x, sums);
    else
      products<S, 1>(q, w + o * q.channels, x, sums);
    spread(q, sums, z + o * n, planes);
    r[o] = normalise(z + o * n, n, eps);
  }
  S* y = planes + 3 * q.apart();
  for (long o = 0; o < half; o++, out += n) {
    for (long i = 0; i < n; i += L) {
      Vec<S> gate = beta[o + half] + gamma[o + half] * load<S>(z + (o + half) * n + i);
      gate = S(1) / (S(1) + exponential<S>(-gate));
      store<S>(g + o * n + i, gate);
      store<S>(y + i, (beta[o] + gamma[o] * load<S>(z + o * n + i)) * gate);
    }
    for (int copy = 0; copy < 4; copy++)
      places(q, copy, [&](long i, long place) { out[place] = y[copy * pixels + i]; });
  }
}

// The derivatives of a trial by x, w, gamma and beta, of that by out. ``spare`` is that of ``zeros``.
template <class S>
static void back(const Shape& q, const S* x, const S* w, const S* gamma, const S* beta, const S* z, const S* r, const S* g,
                 const S* by_out, S* dx, S* dw, S* by_gamma, S* by_beta, S* spare) {
  constexpr int L = Lanes<S>::COUNT;
  const long pixels = q.pixels(), n = 4 * pixels, half = q.outputs / 2;
  S *planes = spare + q.width, *own = planes + 8 * q.apart(), *gate = own + n, *turned = gate + n;
  S* d = turned + q.channels * pixels;
  for (long o = 0; o < half; o++, by_out += n) {
    for (int copy = 0; copy < 4; copy++)
      places(q, copy, [&](long i, long place) { own[copy * pixels + i] = by_out[place]; });
    for (long i = 0; i < n; i += L) {
      Vec<S> gated = load<S>(g + o * n + i), by = load<S>(own + i) * gated;
      store<S>(own + i, by);
      store<S>(gate + i, by * (S(1) - gated) * (beta[o] + gamma[o] * load<S>(z + o * n + i)));
    }
    for (int second = 0; second < 2; second++) {
      const long k = o + second * half;
      S* by = second ? gate : own;
      unnormalise(by, z + k * n, n, gamma[k], r[k], by_gamma + k, by_beta + k);
      gather(q, by, d + k * pixels, q.outputs * pixels, planes);
    }
  }
  if (pixels % (2 * L) == 0)
    by_image<S, BROAD, 2>(q, w, d, dx);
  else
    by_image<S, NARROW, 1>(q, w, d, dx);
  for (long c = 0; c < q.channels; c++)
    for (long p = 0; p < pixels; p++) turned[p * q.channels + c] = x[c * pixels + p];
  if (q.channels % (COLUMNS * L) == 0)
    by_weight<S, COLUMNS>(q, turned, d, dw);
  else
    by_weight<S, 2>(q, turned, d, dw);
}
template <class S> static std::vector<S> zeros(const Shape& q) {  // what both need
  return std::vector<S>(12 * q.apart() + (8 + 9 * q.outputs + q.channels) * q.pixels());
}

// For each trial, ``one(t, spare)``.
template <class S, class F> static int each(const Shape& q, int64_t rows, int64_t threads, F&& one) {
  return in_threads(rows, threads, [&](int64_t from, int64_t to) {
    std::vector<S> spare = zeros<S>(q);
    for (int64_t t = from; t < to; t++) one(t, spare.data());
  });
}

#define ARGUMENTS int64_t channels, int64_t outputs, int64_t height, int64_t width, int64_t rows, int64_t threads
#define SIZES                                                                                                              \
  const Shape q{channels, outputs, height, width};                                                                        \
  const long image = channels * q.pixels(), weights = 9 * outputs * channels, n = 4 * q.pixels(), half = outputs / 2
extern "C" {
#define FUNCTIONS(S, NAME)                                                                                                 \
  int forth_##NAME(const S* x, const S* w, const S* gamma, const S* beta, const double* eps, S* z, S* r, S* g, S* out,     \
                    ARGUMENTS) {                                                                                          \
    SIZES;                                                                                                                \
    return each<S>(q, rows, threads, [&](int64_t t, S* spare) {                                                           \
      forth<S>(q, x + t * image, w + t * weights, gamma + t * outputs, beta + t * outputs, S(*eps), z + t * outputs * n,  \
               r + t * outputs, g + t * half * n, out + t * half * n, spare);                                             \
    });                                                                                                                   \
  }                                                                                                                       \
  int back_##NAME(const S* x, const S* w, const S* gamma, const S* beta, const S* z, const S* r, const S* g,              \
                   const S* by_out, S* dx, S* dw, S* by_gamma, S* by_beta, ARGUMENTS) {                                   \
    SIZES;                                                                                                                \
    return each<S>(q, rows, threads, [&](int64_t t, S* spare) {                                                           \
      back<S>(q, x + t * image, w + t * weights, gamma + t * outputs, beta + t * outputs, z + t * outputs * n,            \
              r + t * outputs, g + t * half * n, by_out + t * half * n, dx + t * image, dw + t * weights,                 \
              by_gamma + t * outputs, by_beta + t * outputs, spare);                                                      \
    });                                                                                                                   \
  }
FUNCTIONS(float, float)
FUNCTIONS(double, double)
}
