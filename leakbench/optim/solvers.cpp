// Steps of solvers, on rows of one search each, in as few passes over memory as the data dependences allow.
#include <limits>

#include "vectors.h"

// The memory of L-BFGS (``History`` of history.py, whose names these are), row after row.
template <class S> struct Memory {
  S *s, *y, *inverse, *yy, *sy, *scale;
  int64_t* pairs;
};
constexpr int MAX_PAIRS = 256;

// <y, S_j>, <g, S_j>, <y, Y_j> and <g, Y_j> of two pairs j, which are read once.
template <class S>
static inline void products(const S* s, const S* y, long size, const S* own, const S* g, S* s_y, S* s_g, S* y_y, S* y_g) {
  constexpr int L = Lanes<S>::COUNT;
  Vec<S> sums[2][4] = {};
  S rest[2][4] = {};
  long i = 0;
  for (; i + L <= size; i += L) {
    Vec<S> by_y = load<S>(own + i), by_g = load<S>(g + i);
    EACH for (int j = 0; j < 2; j++) {
      Vec<S> step = load<S>(s + j * size + i), change = load<S>(y + j * size + i);
      sums[j][0] += by_y * step, sums[j][1] += by_g * step, sums[j][2] += by_y * change, sums[j][3] += by_g * change;
    }
  }
  for (; i < size; i++)
    for (int j = 0; j < 2; j++) {
      S step = s[j * size + i], change = y[j * size + i];
      rest[j][0] += own[i] * step, rest[j][1] += g[i] * step, rest[j][2] += own[i] * change, rest[j][3] += g[i] * change;
    }
  for (int j = 0; j < 2; j++) {
    s_y[j] = total<S>(sums[j][0]) + rest[j][0], s_g[j] = total<S>(sums[j][1]) + rest[j][1];
    y_y[j] = total<S>(sums[j][2]) + rest[j][2], y_g[j] = total<S>(sums[j][3]) + rest[j][3];
  }
}

template <class S> static inline S dot(const S* a, const S* b, long n) {
  constexpr int L = Lanes<S>::COUNT;
  Vec<S> sum{};
  S rest = 0;
  long i = 0;
  for (; i + L <= n; i += L) sum += load<S>(a + i) * load<S>(b + i);
  for (; i < n; i++) rest += a[i] * b[i];
  return total<S>(sum) + rest;
}

// out += the sum over J pairs of c_j S_j - b_j Y_j
template <class S, int J>
static inline void combine(const S* s, const S* y, long size, const S* c, const S* b, S* __restrict out) {
  for (long i = 0; i < size; i++) {
    S sum = out[i];
    EACH for (int j = 0; j < J; j++) sum += c[j] * s[j * size + i] - b[j] * y[j * size + i];
    out[i] = sum;
  }
}

// One row of ``History.direction``: add the pair (s, y) if it is to be kept, and write the direction. Of each trial all
// pairs are read twice, first to last and then last to first, so that those read last are still in the cache.
template <class S>
static void direction(const Memory<S>& all, const S* g, const S* s, const S* y, bool keep, S* out, long row, long length,
                      long size, long used) {
  S *steps = all.s + row * length * size, *changes = all.y + row * length * size;
  S *inverse = all.inverse + row * length * length, *yy = all.yy + row * length * length, *sy = all.sy + row * length;
  long ring = all.pairs[row] % length;
  if (keep) {
    memcpy(steps + ring * size, s, sizeof(S) * size);
    memcpy(changes + ring * size, y, sizeof(S) * size);
  }
  S s_y[MAX_PAIRS] = {}, s_g[MAX_PAIRS], y_y[MAX_PAIRS], y_g[MAX_PAIRS], a[MAX_PAIRS], b[MAX_PAIRS], c[MAX_PAIRS];
  for (long j = 0; j < used; j += 2) {
    long at = j + 2 <= used || used == 1 ? j : used - 2;  // an odd last pair goes with the one before it
    if (used == 1) {
      s_y[0] = dot(y, steps, size), s_g[0] = dot(g, steps, size);
      y_y[0] = dot(y, changes, size), y_g[0] = dot(g, changes, size);
    } else
      products(steps + at * size, changes + at * size, size, y, g, s_y + at, s_g + at, y_y + at, y_g + at);
  }
  if (keep) {
    // R gets the column (S y, s y): its inverse gets -R^-1 S y / s y, with 1 / s y on the diagonal
    S curvature = s_y[ring];
    for (long j = 0; j < used; j++) inverse[ring * length + j] = 0;
    s_y[ring] = 0;
    for (long j = 0; j < used; j++) a[j] = -dot(inverse + j * length, s_y, used) / curvature;
    a[ring] = 1 / curvature;
    for (long j = 0; j < used; j++) {
      inverse[j * length + ring] = a[j];
      yy[ring * length + j] = yy[j * length + ring] = y_y[j];
    }
    sy[ring] = curvature;
    all.scale[row] = curvature / y_y[ring];
    all.pairs[row]++;
  }
  // the formulas of history.py: a, c and d
  S scale = all.pairs[row] > 0 ? all.scale[row] : S(1);
  for (long j = 0; j < used; j++) a[j] = -dot(inverse + j * length, s_g, used), c[j] = 0;
  for (long j = 0; j < used; j++) {
    S weight = sy[j] * a[j] + scale * (y_g[j] + dot(yy + j * length, a, used));
    for (long k = 0; k < used; k++) c[k] += inverse[j * length + k] * weight;
  }
  for (long j = 0; j < used; j++) b[j] = scale * a[j];
  for (long i = 0; i < size; i++) out[i] = -scale * g[i];
  long j = used;
  for (; j >= 4; j -= 4) combine<S, 4>(steps + (j - 4) * size, changes + (j - 4) * size, size, c + j - 4, b + j - 4, out);
  for (; j >= 1; j--) combine<S, 1>(steps + (j - 1) * size, changes + (j - 1) * size, size, c + j - 1, b + j - 1, out);
}
template <class S>
static void directions(const Memory<S>& all, const S* g, const S* s, const S* y, const bool* keep, S* out, long length,
                       long size, long used, long from, long to) {
  for (long r = from; r < to; r++)
    direction<S>(all, g + r * size, s + r * size, y + r * size, keep[r], out + r * size, r, length, size, used);
}

// finite[r] &= every number of row r is finite.
template <class S> static void finite(const S* x, bool* flags, long size, long from, long to) {
  for (long r = from; r < to; r++) {
    int beyond = 0;
    const S* own = x + r * size;
    for (long i = 0; i < size; i++) beyond |= !(std::fabs(own[i]) <= std::numeric_limits<S>::max());
    flags[r] = flags[r] && !beyond;
  }
}

// Adam (Kingma and Ba 2015, algorithm 1) on rows x. ``signed_`` takes the gradient's sign, and ``boxed`` keeps x in
// [0, 1]. Rows that are finite are first written to ``best``, the last iterate known to be finite.
template <class S>
static void adam(S* x, const S* g, S* mean, S* square, S* best, const bool* flags, const double* numbers, long size,
                 bool signed_, bool boxed, long from, long to) {
  const S one = S(numbers[0]), two = S(numbers[1]), share = S(numbers[2]), root = S(numbers[3]), eps = S(numbers[4]),
          rate = S(numbers[5]);
  for (long r = from; r < to; r++) {
    if (flags[r]) memcpy(best + r * size, x + r * size, sizeof(S) * size);
    for (long i = r * size; i < (r + 1) * size; i++) {
      S own = g[i];
      if (signed_) own = own > 0 ? S(1) : own < 0 ? S(-1) : own;
      S m = mean[i] + one * (own - mean[i]), u = square[i] * two + share * own * own;
      S next = x[i] + rate * m / (std::sqrt(u) / root + eps);
      mean[i] = m, square[i] = u;
      x[i] = boxed ? (next < 0 ? S(0) : next > 1 ? S(1) : next) : next;
    }
  }
}

// RMSprop with momentum on rows x, as torch has it; ``best`` as above.
template <class S>
static void rmsprop(S* x, const S* g, S* square, S* momentum, S* best, const bool* flags, const double* numbers, long size,
                    long from, long to) {
  const S alpha = S(numbers[0]), share = S(numbers[1]), keeps = S(numbers[2]), eps = S(numbers[3]), rate = S(numbers[4]);
  constexpr long PART = 4096;  // numbers of which the first cache has all five tensors
  for (long r = from; r < to; r++)
    for (long begin = r * size; begin < (r + 1) * size; begin += PART) {
      long end = begin + PART < (r + 1) * size ? begin + PART : (r + 1) * size;
      if (flags[r]) memcpy(best + begin, x + begin, sizeof(S) * (end - begin));
      for (long i = begin; i < end; i++) {
        S u = square[i] * alpha + share * g[i] * g[i];
        S m = momentum[i] * keeps + g[i] / (std::sqrt(u) + eps);
        square[i] = u, momentum[i] = m;
        x[i] += rate * m;
      }
    }
}

// out = the sum over i of v_i^2 / (v_i x + eps), of numbers x [size] and v [length] of a row, both positive or zero. A division
// serves two terms, a / b + c / d = (a d + c b) / (b d): divisions are what takes the time.
template <class S>
static void gain(const S* x, const S* v, S* out, const double* numbers, long size, long length, long from, long to) {
  constexpr int L = Lanes<S>::COUNT, COLUMNS = 4;
  const S eps = S(numbers[0]);
  for (long r = from; r < to; r++)
    for (long i = 0; i < size; i += COLUMNS * L) {
      Vec<S> own[COLUMNS] = {}, sum[COLUMNS] = {};
      const long count = size - i < COLUMNS * L ? size - i : COLUMNS * L;
      memcpy(own, x + r * size + i, sizeof(S) * count);
      for (long j = 0; j < length; j += 2) {
        const S a = v[r * length + j], b = j + 1 < length ? v[r * length + j + 1] : S(0);
        EACH for (int k = 0; k < COLUMNS; k++) {
          Vec<S> first = a * own[k] + eps, second = b * own[k] + eps;
          sum[k] += (a * a * second + b * b * first) / (first * second);
        }
      }
      memcpy(out + r * size + i, sum, sizeof(S) * count);
    }
}

extern "C" {
int max_pairs() { return MAX_PAIRS; }
#define FUNCTIONS(S, NAME)                                                                                              \
  int directions_##NAME(S* steps, S* changes, S* inverse, S* yy, S* sy, S* scale, int64_t* pairs, const S* g,          \
                         const S* s, const S* y, const bool* keep, S* out, int64_t length, int64_t size, int64_t used, \
                         int64_t rows, int64_t threads) {                                                              \
    const Memory<S> all{steps, changes, inverse, yy, sy, scale, pairs};                                                \
    IN_THREADS(rows, directions<S>(all, g, s, y, keep, out, length, size, used, from, to));                            \
  }                                                                                                                    \
  int finite_##NAME(const S* x, bool* flags, int64_t size, int64_t rows, int64_t threads) {                            \
    IN_THREADS(rows, finite(x, flags, size, from, to));                                                                \
  }                                                                                                                    \
  int adam_##NAME(S* x, const S* g, S* mean, S* square, S* best, const bool* flags, const double* numbers,             \
                   int64_t size, int64_t signed_, int64_t boxed, int64_t rows, int64_t threads) {                      \
    IN_THREADS(rows, adam(x, g, mean, square, best, flags, numbers, size, signed_, boxed, from, to));                  \
  }                                                                                                                    \
  int rmsprop_##NAME(S* x, const S* g, S* square, S* momentum, S* best, const bool* flags, const double* numbers,      \
                      int64_t size, int64_t rows, int64_t threads) {                                                   \
    IN_THREADS(rows, rmsprop(x, g, square, momentum, best, flags, numbers, size, from, to));                           \
  }                                                                                                                    \
  int gain_##NAME(const S* x, const S* v, S* out, const double* numbers, int64_t size, int64_t length, int64_t rows,   \
                   int64_t threads) {                                                                                  \
    IN_THREADS(rows, gain(x, v, out, numbers, size, length, from, to));                                                \
  }
FUNCTIONS(float, float)
FUNCTIONS(double, double)
}
