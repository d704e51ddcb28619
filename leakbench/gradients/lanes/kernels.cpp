// A network's gradient by its weights, and the derivative of a projection of that gradient by the image, of T trials.
//
// Trials are innermost: a value of the network is [elements][L], and one register holds an element of L trials. Own and
// shared weights then cost the same, and nothing is transposed or unfolded. Trials are worked on in blocks of L, each by
// itself from the image to the gradient, so that a block's numbers depend on no other trial.
//
// The gradient g by the weights w is a first backward pass. The derivative of <v, g> by the image needs two passes more,
// since <v, g> is the derivative of the loss along v. Of each value y of the network there are
//     a(y)  the value,                        e(y)  the derivative of the loss by it             (gradient),
//     t(y)  the derivative of a(y) along v,   f(y)  the derivative of e(y) along v               (derivative),
// and f(image) is what is wanted. A linear map y = W x has
//     a(y) = W a(x),   e(x) = W' e(y),   t(y) = V a(x) + W t(x),   f(x) = V' e(y) + W' f(y),
// and a function of each element, y = s(x), has
//     a(y) = s(a(x)),  e(x) = s' e(y),   t(y) = s' t(x),           f(x) = s'' t(x) e(y) + s' f(y).
#include <cstdlib>
#include <utility>

#include "vectors.h"  // LANE_BYTES is the processor's largest register, or half of it for few trials

#ifdef __AVX512F__  // 32 registers, of any size
constexpr int WIDE = 3, HIGH = 4, TALL = 8, PIXELS = 8, ROWS5 = 4, ROWS3 = 2, ROWS1 = 8, KERNEL_ROWS = 3;
#else  // 16 registers
constexpr int WIDE = 2, HIGH = 2, TALL = 6, PIXELS = 4, ROWS5 = 2, ROWS3 = 3, ROWS1 = 6, KERNEL_ROWS = 1;
#endif
// WIDE x PIXELS, HIGH x PIXELS / 2 and TALL x 1: the tiles of outputs x pixels whose sums stay in registers.
// ROWS5 x 5, ROWS3 x KERNEL_ROWS x 3 and ROWS1 x 1: the tiles of outputs x taps of a weight's gradient.

enum Kind { CONV, SIGMOID, TANH, RELU, NORM, SCALE, ADD, PICK, AVERAGE, MAXIMUM, LOSS };

// One operation y = op(x, x2). Values and parameters are numbered; -1 is none.
struct Op {
  int32_t kind, x, x2, y;
  int32_t channels, height, width, outputs, kernel[2], stride[2], padding[2], dilation[2], groups, rows, columns;
  int32_t weight, bias, mean, variance;
  int32_t adds;   // bit 0: e(x) and f(x) already have a share of another operation; bit 1: those of x2
  int32_t moves;  // bit 0: x depends on the weights, so that it has e and t; bit 1: x2 does
  int64_t kept;   // the place of what the operation keeps in the block's memory, in vectors
  const int64_t* picks;  // PICK: for each element of y the one of x, or -1 for zero
  double number;  // the slope of RELU, the epsilon of NORM and SCALE
};

// Sizes of values, and their places in the block's memory (a, e) and in the scratch memory (t, f), in vectors.
struct Program {
  int64_t ops, values, kept, spare;
  const Op* op;
  const int64_t *size, *a, *e, *t, *f;
};

// A parameter: shared [size] or each trial's own [size][T]; its gradient [size][T]; v of any strides.
// Or a gradient that is only compared with an observed one y, in blocks [size][L]: it stays in the block's memory at
// ``place`` (in vectors), and ``dot`` and ``square`` [T] get <g, y> and <g, g>, or <g - y, g - y> where ``gap`` says so. The derivatives
// by them, which the second half finds in their place, then give v = by_dot y + 2 by_square g, or 2 by_square (g - y),
// which is kept at ``tangent`` in the scratch memory.
// A trial of several images has ``group`` lanes, one an image and zeros for those it lacks: a power of two up to L, or whole
// blocks. The mean of its images' gradients takes the place of each of theirs, and is compared.
struct Parameter {
  const void* value;
  int64_t own;
  void* gradient;
  const void* v;
  int64_t v_trial, v_element, size;
  const void* observed;
  int64_t place, tangent, gap, group, images;
  void *dot, *square;
};

// A tensor of T trials by its strides.
struct Rows {
  void* data;
  int64_t trial, element;
};

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { free(data); }
  void* get(size_t wanted) {
    if (wanted > bytes) {
      free(data);
      bytes = 0;
      data = aligned_alloc(64, (wanted + 63) / 64 * 64);
      if (!data) throw std::bad_alloc();
      bytes = wanted;
    }
    return data;
  }
};
enum Use { PADDED, WEIGHT, TANGENT, GRADIENT, BIAS, SPARE, USES };
static thread_local Buffer buffers[USES];
template <class S> static Vec<S>* buffer(Use use, long vectors) {
  return (Vec<S>*)buffers[use].get(sizeof(Vec<S>) * (size_t)(vectors + 1));
}

// Lanes without a trial are zeros: they are computed with, and never written.
template <class S> static inline Vec<S> load(const S* from, int count) {
  Vec<S> v{};
  if (count == Lanes<S>::COUNT)
    memcpy(&v, from, BYTES);
  else
    memcpy(&v, from, count * sizeof(S));
  return v;
}
template <class S> static inline void store(S* to, int count, const Vec<S>& v) {
  if (count == Lanes<S>::COUNT)
    memcpy(to, &v, BYTES);
  else
    memcpy(to, &v, count * sizeof(S));
}

// n elements of a block's trials into lanes, and back. Elements are the outer loop where trials are neighbours; else trials
// are, within tiles of a few elements that stay in the first cache.
template <class S> static void into_lanes(const S* from, long trial, long element, int count, long n, Vec<S>* to) {
  constexpr int L = Lanes<S>::COUNT, TILE = 32;
  if (trial == 1) {
    for (long i = 0; i < n; i++) to[i] = load<S>(from + i * element, count);
    return;
  }
  if (count < L) memset((void*)to, 0, sizeof(Vec<S>) * n);
  for (long begin = 0; begin < n; begin += TILE)
    for (int lane = 0; lane < count; lane++)
      for (long i = begin; i < begin + TILE && i < n; i++) ((S*)to)[i * L + lane] = from[lane * trial + i * element];
}
template <class S> static void out_of_lanes(const Vec<S>* from, long trial, long element, int count, long n, S* to) {
  constexpr int L = Lanes<S>::COUNT, TILE = 32;
  if (trial == 1) {
    for (long i = 0; i < n; i++) store<S>(to + i * element, count, from[i]);
    return;
  }
  for (long begin = 0; begin < n; begin += TILE)
    for (int lane = 0; lane < count; lane++)
      for (long i = begin; i < begin + TILE && i < n; i++) to[lane * trial + i * element] = ((const S*)from)[i * L + lane];
}

// Functions of each element by their value: s(x), then s' and s'' as functions of y = s(x).
template <class S> struct Sigmoid {
  static Vec<S> at(Vec<S> x, S) { return S(1) / (S(1) + exponential<S>(-x)); }
  static Vec<S> first(Vec<S> y, S) { return y - y * y; }
  static Vec<S> second(Vec<S> y, S) { return (y - y * y) * (S(1) - S(2) * y); }
};
template <class S> struct Tanh {
  static Vec<S> at(Vec<S> x, S) {
    Vec<S> small = x * x;  // near zero 1 - 2 / (exp(2 x) + 1) cancels
    Vec<S> series = x * (S(1) - small * (S(1.0 / 3) - small * (S(2.0 / 15) - small * (S(17.0 / 315) - small * S(62.0 / 2835)))));
    Vec<S> whole = S(1) - S(2) / (exponential<S>(x + x) + S(1));
    return small < S(sizeof(S) == 4 ? 1e-2 : 1e-4) ? series : whole;
  }
  static Vec<S> first(Vec<S> y, S) { return S(1) - y * y; }
  static Vec<S> second(Vec<S> y, S) { return S(-2) * y * (S(1) - y * y); }
};
template <class S> struct Relu {  // with a slope below zero
  static Vec<S> at(Vec<S> x, S slope) { return x > S(0) ? x : x * slope; }
  static Vec<S> first(Vec<S> y, S slope) { return y > S(0) ? Vec<S>{} + S(1) : Vec<S>{} + slope; }
  static Vec<S> second(Vec<S>, S) { return Vec<S>{}; }
};

// A sum of products: out[o][p] (+)= bias[o] + sum over channels c and taps k of in[c][at[k] + p] w[o][c][k].
template <class S, class W> struct Sum {
  const Vec<S>* in;
  long channel, row, step;  // strides of the input
  const long *at, *tap;     // the place of each tap in the input and in the weight
  int channels, taps;
  const W* w;
  long w_output, w_channel;
  Vec<S>* out;
  long o_output, o_row, o_step;  // strides of the output
  const Vec<S>* bias;
  bool add;

  // O outputs x P pixels in registers. Channels, then taps, are the inner loops: each step loads P pixels and O weights
  // (a broadcast number if trials share it) for O x P products.
  template <int O, int P> inline void tile(int o, int y, int x) const {
    Vec<S> sum[O][P];
    const Vec<S>* source = in + y * row + x * step;
    Vec<S>* to = out + o * o_output + y * o_row + x * o_step;
    EACH for (int i = 0; i < O; i++)
      EACH for (int p = 0; p < P; p++) sum[i][p] = add ? to[i * o_output + p * o_step] : bias ? bias[o + i] : Vec<S>{};
    for (int c = 0; c < channels; c++) {
      const Vec<S>* from = source + c * channel;
      const W* weight = w + o * w_output + c * w_channel;
      for (int k = 0; k < taps; k++) {
        Vec<S> own[O];
        EACH for (int i = 0; i < O; i++) own[i] = weight[tap[k] + i * w_output] - Vec<S>{};
        const Vec<S>* pixels = from + at[k];
        EACH for (int p = 0; p < P; p++) {
          Vec<S> pixel = pixels[p * step];
          EACH for (int i = 0; i < O; i++) sum[i][p] += own[i] * pixel;
        }
      }
    }
    EACH for (int i = 0; i < O; i++)
      EACH for (int p = 0; p < P; p++) to[i * o_output + p * o_step] = sum[i][p];
  }

  template <int O> void rows(int o, int height, int width) const {
    for (int y = 0; y < height; y++) {
      int x = 0;
      if constexpr (O * PIXELS <= WIDE * PIXELS)
        for (; x + PIXELS <= width; x += PIXELS) tile<O, PIXELS>(o, y, x);
      if constexpr (O * PIXELS / 2 <= WIDE * PIXELS)
        for (; x + PIXELS / 2 <= width; x += PIXELS / 2) tile<O, PIXELS / 2>(o, y, x);
      for (; x < width; x++) tile<O, 1>(o, y, x);
    }
  }

  // Tiles of outputs are the outer loop: the weights of a tile stay in the first cache while it passes over the image.
  void run(int outputs, int height, int width) const {
    int o = 0;
    if (width < PIXELS / 2)
      for (; o + TALL <= outputs; o += TALL) rows<TALL>(o, height, width);
    if (width < PIXELS)
      for (; o + HIGH <= outputs; o += HIGH) rows<HIGH>(o, height, width);
    for (; o + WIDE <= outputs && (WIDE < 3 || outputs - o != 4); o += WIDE) rows<WIDE>(o, height, width);  // four are two pairs
    if constexpr (WIDE > 2)
      for (; o + 2 <= outputs; o += 2) rows<2>(o, height, width);
    for (; o < outputs; o++) rows<1>(o, height, width);
  }
};

constexpr int MAX_TAPS = 1024;  // of a kernel; larger ones are refused before

// x [channels][height][width] within zeros, and its strides; x itself if nothing is around it.
template <class S> static const Vec<S>* padded(const Vec<S>* x, int channels, int height, int width, const int* before,
                                               int whole_height, int whole_width) {
  if (whole_height == height && whole_width == width) return x;
  Vec<S>* out = buffer<S>(PADDED, (long)channels * whole_height * whole_width);
  for (int c = 0; c < channels; c++)
    for (int y = 0; y < whole_height; y++) {
      Vec<S>* to = out + ((long)c * whole_height + y) * whole_width;
      int from = y - before[0], left = before[1], right = whole_width - left - width;
      if (from < 0 || from >= height) {
        memset((void*)to, 0, sizeof(Vec<S>) * whole_width);
        continue;
      }
      memset((void*)to, 0, sizeof(Vec<S>) * left);
      memcpy((void*)(to + left), x + ((long)c * height + from) * width, sizeof(Vec<S>) * width);
      memset((void*)(to + left + width), 0, sizeof(Vec<S>) * right);
    }
  return out;
}
static void around(const Op& q, int* whole) {  // the size of the input with its padding, and with all that the kernel reads
  const int size[2] = {q.height, q.width}, out[2] = {q.rows, q.columns};
  for (int i = 0; i < 2; i++) {
    int read = (out[i] - 1) * q.stride[i] + (q.kernel[i] - 1) * q.dilation[i] + 1;
    whole[i] = size[i] + 2 * q.padding[i] > read ? size[i] + 2 * q.padding[i] : read;
  }
}

// out [outputs][rows][columns] (+)= bias + the convolution of x with w [outputs][channels / groups][kernel].
template <class S, class W>
static void convolve(const Op& q, const Vec<S>* x, const W* w, const Vec<S>* bias, Vec<S>* out, bool add) {
  int whole[2], inputs = q.channels / q.groups, outputs = q.outputs / q.groups, taps = 0;
  around(q, whole);
  const Vec<S>* in = padded<S>(x, q.channels, q.height, q.width, q.padding, whole[0], whole[1]);
  long at[MAX_TAPS], tap[MAX_TAPS], area = (long)whole[0] * whole[1], kernel = (long)q.kernel[0] * q.kernel[1];
  long pixels = (long)q.rows * q.columns;
  for (int a = 0; a < q.kernel[0]; a++)
    for (int b = 0; b < q.kernel[1]; b++, taps++) {
      at[taps] = (long)a * q.dilation[0] * whole[1] + b * q.dilation[1];
      tap[taps] = taps;
    }
  for (int g = 0; g < q.groups; g++)
    Sum<S, W>{in + g * inputs * area, area, (long)q.stride[0] * whole[1], q.stride[1], at, tap, inputs, taps,
              w + g * outputs * inputs * kernel, inputs * kernel, kernel, out + g * outputs * pixels, pixels, q.columns, 1,
              bias ? bias + g * outputs : nullptr, add}
        .run(outputs, q.rows, q.columns);
}

// out [channels][height][width] (+)= the gradient by x of <d, convolve(x, w)>.
// With stride s, the pixels of one phase, p = s j + r, get d[j + (r + padding - a) / s] w[a] of every s-th tap a: a
// convolution of stride 1 for each phase, which writes every s-th pixel.
template <class S, class W> static void by_input(const Op& q, const Vec<S>* d, const W* w, Vec<S>* out, bool add) {
  int inputs = q.channels / q.groups, outputs = q.outputs / q.groups, before[2], whole[2];
  const int out_size[2] = {q.rows, q.columns};
  for (int i = 0; i < 2; i++) {
    before[i] = q.kernel[i] == 1 && q.padding[i] == 0 && q.stride[i] == 1 ? 0 : (q.kernel[i] - 1) * q.dilation[i] + 1;
    whole[i] = out_size[i] + 2 * before[i];
  }
  const Vec<S>* in = padded<S>(d, q.outputs, q.rows, q.columns, before, whole[0], whole[1]);
  long at[MAX_TAPS], tap[MAX_TAPS], area = (long)whole[0] * whole[1], kernel = (long)q.kernel[0] * q.kernel[1];
  long pixels = (long)q.height * q.width;
  for (int py = 0; py < q.stride[0] && py < q.height; py++)
    for (int px = 0; px < q.stride[1] && px < q.width; px++) {
      int taps = 0;
      for (int a = 0; a < q.kernel[0]; a++)
        for (int b = 0; b < q.kernel[1]; b++) {
          int y = py + q.padding[0] - a * q.dilation[0], x = px + q.padding[1] - b * q.dilation[1];
          if (y % q.stride[0] || x % q.stride[1]) continue;
          at[taps] = (long)(before[0] + y / q.stride[0]) * whole[1] + before[1] + x / q.stride[1];
          tap[taps++] = a * q.kernel[1] + b;
        }
      int height = (q.height - py + q.stride[0] - 1) / q.stride[0], width = (q.width - px + q.stride[1] - 1) / q.stride[1];
      for (int g = 0; g < q.groups; g++)
        Sum<S, W>{in + g * outputs * area, area, whole[1], 1, at, tap, outputs, taps, w + g * outputs * inputs * kernel,
                  kernel, inputs * kernel, out + g * inputs * pixels + (long)py * q.width + px, pixels,
                  (long)q.stride[0] * q.width, q.stride[1], nullptr, add}
            .run(inputs, height, width);
    }
}

// The gradient by the weight of <d, convolve(x, w)>: w[o][c][a][b] = sum over pixels of d[o][y][x] in[c][y s + a][x s + b].
// O outputs x A x B taps in registers; the pixels are the inner loops: each loads O errors and A x B inputs.
template <class S, int O, int A, int B> struct Taps {
  const Vec<S>* in;
  long row, step, down, right;  // strides of the input by output pixel and by tap
  const Vec<S>* d;
  long output, width;
  int rows, columns;
  Vec<S>* to;
  long to_output, to_row;

  void run() const {
    Vec<S> sum[O][A][B];
    EACH for (int i = 0; i < O; i++) EACH for (int a = 0; a < A; a++) EACH for (int b = 0; b < B; b++) sum[i][a][b] = Vec<S>{};
    for (int y = 0; y < rows; y++)
      for (int x = 0; x < columns; x++) {
        const Vec<S>*from = in + y * row + x * step, *error = d + y * width + x;
        Vec<S> own[O];
        EACH for (int i = 0; i < O; i++) own[i] = error[i * output];
        EACH for (int a = 0; a < A; a++) EACH for (int b = 0; b < B; b++) {
          Vec<S> pixel = from[a * down + b * right];
          EACH for (int i = 0; i < O; i++) sum[i][a][b] += own[i] * pixel;
        }
      }
    EACH for (int i = 0; i < O; i++) EACH for (int a = 0; a < A; a++) EACH for (int b = 0; b < B; b++)
      to[i * to_output + a * to_row + b] = sum[i][a][b];
  }
};

// One channel's taps for the outputs from o on, in tiles of as many outputs as registers allow.
template <class S, int O, int A, int B>
static int tiles(const Op& q, const Vec<S>* in, long width, const Vec<S>* d, Vec<S>* to, long to_output, int o, int outputs) {
  for (; o + O <= outputs; o += O)
    for (int a = 0; a + A <= q.kernel[0]; a += A)
      for (int b = 0; b + B <= q.kernel[1]; b += B)
        Taps<S, O, A, B>{in + a * q.dilation[0] * width + b * q.dilation[1], q.stride[0] * width, q.stride[1],
                         q.dilation[0] * width, q.dilation[1], d + (long)o * q.rows * q.columns, (long)q.rows * q.columns,
                         q.columns, q.rows, q.columns, to + o * to_output + a * q.kernel[1] + b, to_output, q.kernel[1]}
            .run();
  return o;
}
template <class S> static void by_weight(const Op& q, const Vec<S>* x, const Vec<S>* d, Vec<S>* out) {
  int whole[2], inputs = q.channels / q.groups, outputs = q.outputs / q.groups;
  if (q.kernel[0] * q.kernel[1] == 1 && q.rows * q.columns == 1 && q.height * q.width == 1 && q.groups == 1) {
    for (int o = 0; o < outputs; o++)  // a linear map: an outer product
      for (int c = 0; c < inputs; c++) out[(long)o * inputs + c] = d[o] * x[c];
    return;
  }
  around(q, whole);
  const Vec<S>* in = padded<S>(x, q.channels, q.height, q.width, q.padding, whole[0], whole[1]);
  long area = (long)whole[0] * whole[1], kernel = (long)q.kernel[0] * q.kernel[1], to_output = inputs * kernel;
  for (int g = 0; g < q.groups; g++)
    for (int c = 0; c < inputs; c++) {
      const Vec<S>* from = in + (g * inputs + c) * area;
      const Vec<S>* errors = d + (long)g * outputs * q.rows * q.columns;
      Vec<S>* to = out + (long)g * outputs * to_output + c * kernel;
      int o = 0;
      if (q.kernel[1] == 5) {
        o = tiles<S, ROWS5, 1, 5>(q, from, whole[1], errors, to, to_output, o, outputs);
        tiles<S, 1, 1, 5>(q, from, whole[1], errors, to, to_output, o, outputs);
      } else if (q.kernel[1] == 3 && q.kernel[0] == 3) {
        o = tiles<S, ROWS3, KERNEL_ROWS, 3>(q, from, whole[1], errors, to, to_output, o, outputs);
        tiles<S, 1, KERNEL_ROWS, 3>(q, from, whole[1], errors, to, to_output, o, outputs);
      } else {
        o = tiles<S, ROWS1, 1, 1>(q, from, whole[1], errors, to, to_output, o, outputs);
        tiles<S, 1, 1, 1>(q, from, whole[1], errors, to, to_output, o, outputs);
      }
    }
}

// The four passes of one block of trials.
// A fold adds lanes whose places differ in one bit, so that after log2(N) folds each of N lanes has their sum.
template <class S, int STEP, size_t... J> static inline Vec<S> exchanged(const Vec<S>& v, std::index_sequence<J...>) {
  return Vec<S>{v[(J ^ STEP) % sizeof...(J)]...};
}
template <class S, int STEP> static inline Vec<S> folded(const Vec<S>& v) {
  return v + exchanged<S, STEP>(v, std::make_index_sequence<Lanes<S>::COUNT>());
}

template <class S> struct Block {
  using V = Vec<S>;
  static constexpr int L = Lanes<S>::COUNT;
  const Program& program;
  const Parameter* parameters;
  V *memory, *scratch;
  long trials, first;
  int count;  // of the block's trials

  V* a(int value) const { return memory + program.a[value]; }
  V* e(int value) const { return memory + program.e[value]; }
  V* t(int value) const { return scratch + program.t[value]; }
  V* f(int value) const { return scratch + program.f[value]; }
  V* kept(const Op& q) const { return memory + q.kept; }

  // a parameter [size] in lanes, or v of it; a shared one is broadcast, only where that is small
  V* lanes(int number, Use use, bool along) const {
    const Parameter& p = parameters[number];
    V* out = along && p.observed ? scratch + p.tangent : buffer<S>(use, p.size);
    if (along && p.observed) {
      V by_g, by_y;
      factors(p, by_g, by_y);
      const V *g = memory + p.place, *y = observed(p);
      if (p.gap)
        for (long i = 0; i < p.size; i++) out[i] = (g[i] - y[i]) * by_g;
      else
        for (long i = 0; i < p.size; i++) out[i] = g[i] * by_g + y[i] * by_y;
    } else if (along)
      into_lanes<S>((const S*)p.v + first * p.v_trial, p.v_trial, p.v_element, count, p.size, out);
    else if (p.own)
      into_lanes<S>((const S*)p.value + first, 1, trials, count, p.size, out);
    else
      for (long i = 0; i < p.size; i++) out[i] = V{} + ((const S*)p.value)[i];
    return out;
  }
  bool has_along(int number) const { return number >= 0 && (parameters[number].v || parameters[number].square); }
  V* along(int number, Use use) const { return has_along(number) ? lanes(number, use, true) : nullptr; }
  bool own(int number) const { return parameters[number].own; }
  const S* shared(int number) const { return (const S*)parameters[number].value; }
  bool wanted(int number) const { return number >= 0 && (parameters[number].gradient || parameters[number].observed); }
  const V* observed(const Parameter& p) const { return (const V*)p.observed + first / L * p.size; }
  V* begin(int number) const {  // where a gradient is to be written before it is put
    const Parameter& p = parameters[number];
    return p.observed ? memory + p.place : buffer<S>(GRADIENT, p.size);
  }
  void put(int number, const V* gradient) const {
    const Parameter& p = parameters[number];
    if (p.observed)
      compare(number);
    else
      out_of_lanes<S>(gradient, 1, trials, count, p.size, (S*)p.gradient + first);
  }
  void put(int number, long i, V value) const {
    if (!wanted(number)) return;
    const Parameter& p = parameters[number];
    if (p.observed)
      memory[p.place + i] = value;
    else
      store<S>((S*)p.gradient + i * trials + first, count, value);
  }
  // The mean gradient of a trial's images in the place of theirs.
  void mean(const Parameter& p, long from, long to) const {
    const long several = p.group > L ? p.group / L : 1, width = p.group < L ? p.group : L;
    const S part = S(1) / S(p.images);
    V* g = memory + p.place;
    for (long i = from; i < to; i++) {
      V sum = g[i];
      for (long k = 1; k < several; k++) sum += g[k * program.kept + i];
      if (width > 1) sum = folded<S, 1>(sum);
      if (width > 2) sum = folded<S, 2>(sum);
      if (width > 4) sum = folded<S, 4>(sum);
      if (width > 8) sum = folded<S, 8>(sum);
      sum *= part;
      for (long k = 0; k < several; k++) g[k * program.kept + i] = sum;
    }
  }
  // <g, y> and <g, g>, or <g - y, g - y>. Where the images of a trial fill several blocks, ``meet`` does it when all are done.
  void compare(int number) const {
    if (number >= 0 && parameters[number].observed && parameters[number].group <= L) compared(parameters[number]);
  }
  // Every 256 elements are added up by themselves, which loses less to rounding.
  void compared(const Parameter& p) const {
    const V *g = memory + p.place, *y = observed(p);
    V dots{}, squares{};
    for (long i = 0; i < p.size; i += 256) {
      constexpr int CHAINS = 4;  // a sum waits for the one before it
      V dot[CHAINS] = {}, square[CHAINS] = {};
      long end = i + 256 < p.size ? i + 256 : p.size;
      if (p.group > 1) mean(p, i, end);
      auto add = [&](long at, int chain) {
        V own = p.gap ? g[at] - y[at] : g[at];
        if (!p.gap) dot[chain] += own * y[at];
        square[chain] += own * own;
      };
      long at = i;
      for (; at + CHAINS <= end; at += CHAINS)
        EACH for (int j = 0; j < CHAINS; j++) add(at + j, j);
      for (; at < end; at++) add(at, 0);
      for (int j = 0; j < CHAINS; j++) dots += dot[j], squares += square[j];
    }
    if (!p.gap) store<S>((S*)p.dot + first, count, dots);
    store<S>((S*)p.square + first, count, squares);
  }
  void factors(const Parameter& p, V& by_g, V& by_y) const {
    by_g = S(2) * load<S>((const S*)p.square + first, count);
    by_y = p.gap ? V{} : load<S>((const S*)p.dot + first, count);
  }
  V number(int parameter, long i, S missing) const {  // one number of a parameter, or of none
    if (parameter < 0) return V{} + missing;
    const Parameter& p = parameters[parameter];
    return p.own ? load<S>((const S*)p.value + i * trials + first, count) : V{} + ((const S*)p.value)[i];
  }
  V number_along(int parameter, long i) const {
    if (!has_along(parameter)) return V{};
    const Parameter& p = parameters[parameter];
    V out, by_y;
    if (p.observed) {
      factors(p, out, by_y);
      V g = memory[p.place + i], y = observed(p)[i];
      return p.gap ? (g - y) * out : g * out + y * by_y;
    }
    into_lanes<S>((const S*)p.v + i * p.v_element + first * p.v_trial, p.v_trial, p.v_element, count, 1, &out);
    return out;
  }

  // y = s(x)
  template <template <class> class F> void element(const Op& q, int pass) const {
    long n = program.size[q.y];
    const S p = S(q.number);
    V *ay = a(q.y), *ey = e(q.y);
    bool add = q.adds & 1, moves = q.moves & 1;
    if (pass == 0)
      for (long i = 0; i < n; i++) ay[i] = F<S>::at(a(q.x)[i], p);
    if (pass == 1 && moves) {
      V* ex = e(q.x);
      for (long i = 0; i < n; i++) ex[i] = F<S>::first(ay[i], p) * ey[i] + (add ? ex[i] : V{});
    }
    if (pass == 2 && moves) {
      V *tx = t(q.x), *ty = t(q.y);
      for (long i = 0; i < n; i++) ty[i] = F<S>::first(ay[i], p) * tx[i];
    }
    if (pass == 3) {
      V *fx = f(q.x), *fy = f(q.y), *tx = moves ? t(q.x) : nullptr;
      for (long i = 0; i < n; i++) {
        V sum = F<S>::first(ay[i], p) * fy[i] + (add ? fx[i] : V{});
        fx[i] = moves ? sum + F<S>::second(ay[i], p) * tx[i] * ey[i] : sum;
      }
    }
  }

  // y = w * x + b
  void convolution(const Op& q, int pass) const {
    bool mine = own(q.weight), add = q.adds & 1, moves = q.moves & 1;
    if (pass == 0) {
      V* bias = q.bias < 0 ? nullptr : lanes(q.bias, BIAS, false);
      if (mine)
        convolve<S, V>(q, a(q.x), lanes(q.weight, WEIGHT, false), bias, a(q.y), false);
      else
        convolve<S, S>(q, a(q.x), shared(q.weight), bias, a(q.y), false);
    }
    if (pass == 1) {
      V* ey = e(q.y);
      long pixels = (long)q.rows * q.columns;
      if (wanted(q.bias))
        for (int o = 0; o < q.outputs; o++) {
          V sum{};
          for (long i = 0; i < pixels; i++) sum += ey[o * pixels + i];
          put(q.bias, o, sum);
        }
      if (wanted(q.weight)) {
        V* gradient = begin(q.weight);
        by_weight<S>(q, a(q.x), ey, gradient);
        put(q.weight, gradient);
      }
      if (moves) {
        if (mine)
          by_input<S, V>(q, ey, lanes(q.weight, WEIGHT, false), e(q.x), add);
        else
          by_input<S, S>(q, ey, shared(q.weight), e(q.x), add);
      }
    }
    if (pass == 2) {
      V *v = along(q.weight, TANGENT), *bias = along(q.bias, BIAS), *ty = t(q.y);
      bool begun = v != nullptr;
      if (v) convolve<S, V>(q, a(q.x), v, bias, ty, false);
      if (moves && mine) convolve<S, V>(q, t(q.x), lanes(q.weight, WEIGHT, false), bias, ty, begun);
      if (moves && !mine) convolve<S, S>(q, t(q.x), shared(q.weight), bias, ty, begun);
      if (!begun && !moves)
        for (int o = 0; o < q.outputs; o++)
          for (int i = 0; i < q.rows * q.columns; i++) ty[o * q.rows * q.columns + i] = bias ? bias[o] : V{};
    }
    if (pass == 3) {
      if (mine)
        by_input<S, V>(q, f(q.y), lanes(q.weight, WEIGHT, false), f(q.x), add);
      else
        by_input<S, S>(q, f(q.y), shared(q.weight), f(q.x), add);
      if (has_along(q.weight)) {
        const Parameter& p = parameters[q.weight];
        by_input<S, V>(q, e(q.y), p.observed ? scratch + p.tangent : along(q.weight, TANGENT), f(q.x), true);
      }
    }
  }

  // y = gamma z + beta with z = (x - mean(x)) r and r = 1 / sqrt(var(x) + eps), for each channel; means over its n pixels.
  // With P u = u - mean(u) - z mean(u z), which is symmetric:
  //     e(x) = gamma r P e(y),   z' = r P t(x),   r' / r = -r mean(z t(x)),   t(y) = gamma z' + v_gamma z + v_beta,
  //     f(x) = (v_gamma + gamma r' / r) r P e(y) + gamma r P f(y) - gamma r (z' mean(e(y) z) + z mean(e(y) z')).
  // Of each channel mean, r, mean(e), mean(e z), mean(t), mean(z t) and mean(e t) are kept.
  void normalisation(const Op& q, int pass) const {
    long n = (long)q.height * q.width;
    const S part = S(1) / S(n);
    bool add = q.adds & 1, moves = q.moves & 1;
    for (int c = 0; c < q.channels; c++) {
      V* k = kept(q) + 7 * c;
      const V* x = a(q.x) + c * n;
      V gamma = number(q.weight, c, 1);
      if (pass == 0) {
        V* y = a(q.y) + c * n;
        V sum{}, square{}, beta = number(q.bias, c, 0);
        for (long i = 0; i < n; i++) sum += x[i];
        V mean = sum * part;
        for (long i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
        V r = square * part + S(q.number);
        for (int j = 0; j < L; j++) r[j] = S(1) / std::sqrt(r[j]);
        for (long i = 0; i < n; i++) y[i] = gamma * ((x[i] - mean) * r) + beta;
        k[0] = mean, k[1] = r;
      }
      if (pass == 1) {
        const V* ey = e(q.y) + c * n;
        V mean = k[0], r = k[1], sum{}, dot{};
        for (long i = 0; i < n; i++) sum += ey[i], dot += ey[i] * ((x[i] - mean) * r);
        put(q.weight, c, dot);
        put(q.bias, c, sum);
        V me = k[2] = sum * part, mez = k[3] = dot * part, scale = gamma * r;
        if (!moves) continue;
        V* ex = e(q.x) + c * n;
        for (long i = 0; i < n; i++) ex[i] = scale * (ey[i] - me - ((x[i] - mean) * r) * mez) + (add ? ex[i] : V{});
      }
      if (pass == 2) {
        const V *ey = e(q.y) + c * n, *tx = moves ? t(q.x) + c * n : nullptr;
        V *ty = t(q.y) + c * n, mean = k[0], r = k[1], sum{}, dot{}, cross{};
        V by_gamma = number_along(q.weight, c), by_beta = number_along(q.bias, c);
        for (long i = 0; moves && i < n; i++) sum += tx[i], dot += tx[i] * ((x[i] - mean) * r), cross += tx[i] * ey[i];
        V mt = k[4] = sum * part, mzt = k[5] = dot * part, scale = gamma * r;
        k[6] = cross * part;
        for (long i = 0; i < n; i++) {
          V z = (x[i] - mean) * r, own = by_gamma * z + by_beta;
          ty[i] = moves ? scale * (tx[i] - mt - z * mzt) + own : own;
        }
      }
      if (pass == 3) {
        const V *ey = e(q.y) + c * n, *fy = f(q.y) + c * n, *tx = moves ? t(q.x) + c * n : nullptr;
        V *fx = f(q.x) + c * n, mean = k[0], r = k[1], me = k[2], mez = k[3], mt = k[4], mzt = k[5], sum{}, dot{};
        for (long i = 0; i < n; i++) sum += fy[i], dot += fy[i] * ((x[i] - mean) * r);
        V mf = sum * part, mfz = dot * part, mezt = r * (k[6] - me * mt - mez * mzt);
        V by_e = (number_along(q.weight, c) - gamma * r * mzt) * r, by_f = gamma * r, by_t = -gamma * r * r * mez;
        V by_z = -by_e * mez - by_f * mfz - by_t * mzt - by_f * mezt, rest = -by_e * me - by_f * mf - by_t * mt;
        for (long i = 0; i < n; i++) {
          V out = by_e * ey[i] + by_f * fy[i] + by_z * ((x[i] - mean) * r) + rest + (add ? fx[i] : V{});
          fx[i] = moves ? out + by_t * tx[i] : out;
        }
      }
    }
  }

  // y = gamma z + beta with z = (x - mean) r by running statistics.
  void scaling(const Op& q, int pass) const {
    long n = (long)q.height * q.width;
    bool add = q.adds & 1, moves = q.moves & 1;
    for (int c = 0; c < q.channels; c++) {
      V gamma = number(q.weight, c, 1), mean = number(q.mean, c, 0), r = number(q.variance, c, 1) + S(q.number);
      for (int j = 0; j < L; j++) r[j] = S(1) / std::sqrt(r[j]);
      V scale = gamma * r, by_gamma = number_along(q.weight, c), by_beta = number_along(q.bias, c);
      const V* x = a(q.x) + c * n;
      if (pass == 0) {
        V *y = a(q.y) + c * n, beta = number(q.bias, c, 0);
        for (long i = 0; i < n; i++) y[i] = (x[i] - mean) * scale + beta;
        continue;
      }
      const V* ey = e(q.y) + c * n;
      if (pass == 1) {
        V sum{}, dot{}, *ex = moves ? e(q.x) + c * n : nullptr;
        for (long i = 0; i < n; i++) sum += ey[i], dot += ey[i] * ((x[i] - mean) * r);
        put(q.weight, c, dot);
        put(q.bias, c, sum);
        for (long i = 0; moves && i < n; i++) ex[i] = scale * ey[i] + (add ? ex[i] : V{});
      }
      if (pass == 2) {
        V *ty = t(q.y) + c * n, *tx = moves ? t(q.x) + c * n : nullptr;
        for (long i = 0; i < n; i++) ty[i] = by_gamma * ((x[i] - mean) * r) + by_beta + (moves ? scale * tx[i] : V{});
      }
      if (pass == 3) {
        V *fx = f(q.x) + c * n, *fy = f(q.y) + c * n;
        for (long i = 0; i < n; i++) fx[i] = scale * fy[i] + by_gamma * r * ey[i] + (add ? fx[i] : V{});
      }
    }
  }

  // y = map(x) and back, for maps that take or average elements: to each element of y go some of x with a weight.
  // They are linear, so that a and t, and e and f, are alike.
  void linear(const Op& q, int pass) const {
    bool moves = q.moves & 1;
    if (pass == 0) forth(q, a(q.x), a(q.y));
    if (pass == 1 && moves) back(q, e(q.x), e(q.y));
    if (pass == 2 && moves) forth(q, t(q.x), t(q.y));
    if (pass == 3) back(q, f(q.x), f(q.y));
  }
  void forth(const Op& q, const V* x, V* y) const {
    if (q.kind == PICK)
      for (long i = 0; i < program.size[q.y]; i++) y[i] = q.picks[i] < 0 ? V{} : x[q.picks[i]];
    else if (q.kind == MAXIMUM)
      windows(q, [&](long to, long from, int tap) {
        V chosen = selection(q)[to] == tap ? x[from] : V{};
        y[to] = tap ? y[to] + chosen : chosen;
      });
    else
      averages(q, [&](long to, long from, S share, bool begins) { y[to] = x[from] * share + (begins ? V{} : y[to]); });
  }
  void back(const Op& q, V* x, const V* y) const {
    if (!(q.adds & 1)) memset((void*)x, 0, sizeof(V) * program.size[q.x]);
    if (q.kind == PICK)
      for (long i = 0; i < program.size[q.y]; i++) {
        if (q.picks[i] >= 0) x[q.picks[i]] += y[i];
      }
    else if (q.kind == MAXIMUM)
      windows(q, [&](long to, long from, int tap) { x[from] += selection(q)[to] == tap ? y[to] : V{}; });
    else
      averages(q, [&](long to, long from, S share, bool) { x[from] += y[to] * share; });
  }
  template <class F> void averages(const Op& q, F&& each) const {  // window i of n covers i H / n to (i + 1) H / n
    for (int c = 0; c < q.channels; c++)
      for (int y = 0; y < q.rows; y++)
        for (int x = 0; x < q.columns; x++) {
          int top = y * q.height / q.rows, bottom = ((y + 1) * q.height + q.rows - 1) / q.rows;
          int left = x * q.width / q.columns, right = ((x + 1) * q.width + q.columns - 1) / q.columns;
          S share = S(1) / S((bottom - top) * (right - left));
          long to = ((long)c * q.rows + y) * q.columns + x;
          for (int v = top; v < bottom; v++)
            for (int u = left; u < right; u++)
              each(to, ((long)c * q.height + v) * q.width + u, share, v == top && u == left);
        }
  }
  template <class F> void windows(const Op& q, F&& each) const {
    for (int c = 0; c < q.channels; c++)
      for (int y = 0; y < q.rows; y++)
        for (int x = 0; x < q.columns; x++) {
          long to = ((long)c * q.rows + y) * q.columns + x;
          int tap = 0;
          for (int v = 0; v < q.kernel[0]; v++)
            for (int u = 0; u < q.kernel[1]; u++) {
              int row = y * q.stride[0] - q.padding[0] + v * q.dilation[0];
              int column = x * q.stride[1] - q.padding[1] + u * q.dilation[1];
              if (row < 0 || row >= q.height || column < 0 || column >= q.width) continue;
              each(to, ((long)c * q.height + row) * q.width + column, tap++);
            }
        }
  }
  using Whole = decltype(V{} < V{});
  Whole* selection(const Op& q) const { return (Whole*)kept(q); }  // which pixel of its window is the largest, the first of equals
  void maximum(const Op& q, int pass) const {
    if (pass) return linear(q, pass);
    V *x = a(q.x), *y = a(q.y);
    windows(q, [&](long to, long from, int tap) {
      Whole larger = tap ? x[from] > y[to] : ~Whole{};
      selection(q)[to] = larger ? Whole{} + tap : selection(q)[to];
      y[to] = larger ? x[from] : y[to];
    });
  }

  // y = x + x2
  void addition(const Op& q, int pass) const {
    long n = program.size[q.y];
    bool moves = q.moves & 1, moves2 = q.moves & 2;
    auto give = [&](V* x, const V* y, bool add) {
      for (long i = 0; i < n; i++) x[i] = add ? x[i] + y[i] : y[i];
    };
    if (pass == 0)
      for (long i = 0; i < n; i++) a(q.y)[i] = a(q.x)[i] + a(q.x2)[i];
    if (pass == 1 && moves) give(e(q.x), e(q.y), q.adds & 1);
    if (pass == 1 && moves2) give(e(q.x2), e(q.y), q.adds & 2);
    if (pass == 2 && (moves || moves2))
      for (long i = 0; i < n; i++) t(q.y)[i] = (moves ? t(q.x)[i] : V{}) + (moves2 ? t(q.x2)[i] : V{});
    if (pass == 3) give(f(q.x), f(q.y), q.adds & 1), give(f(q.x2), f(q.y), q.adds & 2);
  }

  // The cross-entropy -sum(q log p) of logits x, p = softmax(x), and labels q [K]: e(x) = sum(q) p - q,
  // f(x) = sum(q) p (t(x) - <p, t(x)>), and the derivative by q is <p, t(x)> - t(x). q, p and that are kept.
  void loss(const Op& q, int pass) const {
    long n = program.size[q.x];
    V *label = kept(q), *p = label + n, *by_label = p + n, sum{}, all{};
    for (long i = 0; i < n; i++) all += label[i];
    if (pass == 0) {
      V top = a(q.x)[0];
      for (long i = 1; i < n; i++) top = a(q.x)[i] > top ? a(q.x)[i] : top;
      for (long i = 0; i < n; i++) sum += p[i] = exponential<S>(a(q.x)[i] - top);
      for (long i = 0; i < n; i++) p[i] /= sum;
    }
    if (pass == 1)
      for (long i = 0; i < n; i++) e(q.x)[i] = all * p[i] - label[i];
    if (pass == 3) {
      for (long i = 0; i < n; i++) sum += p[i] * t(q.x)[i];
      for (long i = 0; i < n; i++) {
        f(q.x)[i] = all * p[i] * (t(q.x)[i] - sum);
        by_label[i] = sum - t(q.x)[i];
      }
    }
  }

  void step(const Op& q, int pass) const {
    switch (q.kind) {
      case CONV: return convolution(q, pass);
      case SIGMOID: return element<Sigmoid>(q, pass);
      case TANH: return element<Tanh>(q, pass);
      case RELU: return element<Relu>(q, pass);
      case NORM: return normalisation(q, pass);
      case SCALE: return scaling(q, pass);
      case ADD: return addition(q, pass);
      case MAXIMUM: return maximum(q, pass);
      case LOSS: return loss(q, pass);
      default: return linear(q, pass);
    }
  }
  void forwards(int pass) const {
    for (long i = 0; i < program.ops; i++) step(program.op[i], pass);
  }
  void backwards(int pass) const {
    for (long i = program.ops - 1; i >= 0; i--) step(program.op[i], pass);
  }
};

// The image is value 0, and the loss is the last operation.
template <class S>
static void gradient(const Program& program, const Parameter* parameters, Rows x, Rows q, S* memory, long trials, long from,
                     long to) {
  constexpr int L = Lanes<S>::COUNT;
  const Op& last = program.op[program.ops - 1];
  for (long b = from; b < to; b++) {
    long first = b * L, left = trials - first;
    Block<S> block{program, parameters, (Vec<S>*)memory + b * program.kept, nullptr, trials, first, left < L ? (int)left : L};
    into_lanes<S>((const S*)x.data + first * x.trial, x.trial, x.element, block.count, program.size[0], block.a(0));
    into_lanes<S>((const S*)q.data + first * q.trial, q.trial, q.element, block.count, program.size[last.x], block.kept(last));
    block.forwards(0);
    block.backwards(1);
    for (long i = 0; i < program.ops; i++) {  // of which single numbers were put
      block.compare(program.op[i].bias);
      if (program.op[i].kind != CONV) block.compare(program.op[i].weight);
    }
  }
}
// Compares the gradients of trials whose images fill several blocks each: one of ``count`` parameters of a trial at a time.
template <class S>
static void meet(const Program& program, const Parameter* parameters, S* memory, long trials, long group, long count, long from,
                 long to) {
  constexpr int L = Lanes<S>::COUNT;
  for (long n = from; n < to; n++) {
    const long first = n / count * group;
    const Parameter& p = parameters[n % count];
    if (!p.observed) continue;
    Block<S>{program, parameters, (Vec<S>*)memory + first / L * program.kept, nullptr, trials, first, L}.compared(p);
  }
}
template <class S>
static void derivative(const Program& program, const Parameter* parameters, Rows x, Rows q, S* memory, long trials, long from,
                       long to) {
  constexpr int L = Lanes<S>::COUNT;
  const Op& last = program.op[program.ops - 1];
  for (long b = from; b < to; b++) {
    long first = b * L, left = trials - first;
    Block<S> block{program, parameters, (Vec<S>*)memory + b * program.kept, buffer<S>(SPARE, program.spare), trials, first,
                   left < L ? (int)left : L};
    block.forwards(2);
    block.backwards(3);
    out_of_lanes<S>(block.f(0), x.trial, x.element, block.count, program.size[0], (S*)x.data + first * x.trial);
    const Vec<S>* by_label = block.kept(last) + 2 * program.size[last.x];
    if (q.data) out_of_lanes<S>(by_label, q.trial, q.element, block.count, program.size[last.x], (S*)q.data + first * q.trial);
  }
}

// An operand of one of the three maps below: its strides, that of trials being 0 if they share it.
struct Operand {
  void* data;
  int64_t trial, image, element, size;
};

// An image's operand in lanes: where it is, if it is so there.
template <class S> static Vec<S>* in_lanes(const Operand& p, Use use, long first, int count, long image, bool read) {
  constexpr int L = Lanes<S>::COUNT;
  S* from = (S*)p.data + first * p.trial + image * p.image;
  if (p.trial == 1 && p.element == L && count == L && (uintptr_t)from % BYTES == 0) return (Vec<S>*)from;
  Vec<S>* to = buffer<S>(use, p.size);
  if (read) into_lanes<S>(from, p.trial, p.element, count, p.size, to);
  return to;
}
template <class S> static void out_of(const Operand& p, const Vec<S>* from, long first, int count, long image) {
  S* to = (S*)p.data + first * p.trial + image * p.image;
  if ((const void*)to != (const void*)from) out_of_lanes<S>(from, p.trial, p.element, count, p.size, to);
}

// A convolution y of x and w (``which`` 2), or the gradient of <d, y> by x (0) or w (1) with d in the place of y: of T trials
// of several images each.
template <class S>
static void map(const Op& q, long which, const Operand& x, const Operand& w, const Operand& y, long images, long trials,
                long from, long to) {
  constexpr int L = Lanes<S>::COUNT;
  for (long b = from; b < to; b++) {
    const long first = b * L;
    const int count = trials - first < L ? (int)(trials - first) : L;
    const S* shared = which != 1 && w.trial == 0 ? (const S*)w.data : nullptr;
    Vec<S>* weight = shared ? nullptr : in_lanes<S>(w, WEIGHT, first, count, 0, which != 1);
    for (long i = 0; i < images; i++) {
      Vec<S>* in = in_lanes<S>(x, TANGENT, first, count, i, which != 0);
      Vec<S>* out = in_lanes<S>(y, SPARE, first, count, i, which != 2);
      if (which == 0) {
        shared ? by_input<S, S>(q, out, shared, in, false) : by_input<S, Vec<S>>(q, out, weight, in, false);
        out_of<S>(x, in, first, count, i);
      } else if (which == 1) {
        Vec<S>* share = i ? buffer<S>(GRADIENT, w.size) : weight;
        by_weight<S>(q, in, out, share);
        for (long k = 0; i && k < w.size; k++) weight[k] += share[k];
      } else {
        shared ? convolve<S, S>(q, in, shared, nullptr, out, false) : convolve<S, Vec<S>>(q, in, weight, nullptr, out, false);
        out_of<S>(y, out, first, count, i);
      }
    }
    if (which == 1) out_of<S>(w, weight, first, count, 0);
  }
}

// Normalisation of channels [n][T], as in ``Block::normalisation``, by columns of L trials: z = (x - mean(x)) r, with r kept.
template <class S> static void standardise(const S* x, S* z, S* r, const double* eps, long n, long trials, long from, long to) {
  constexpr int L = Lanes<S>::COUNT;
  const S part = S(1) / S(n);
  for (long c = from; c < to; c++)
    for (long t = 0; t < trials; t += L) {
      const int count = trials - t < L ? (int)(trials - t) : L;
      const S* own = x + c * n * trials + t;
      S* to_z = z + c * n * trials + t;
      Vec<S> sum{}, square{};
      for (long i = 0; i < n; i++) sum += load<S>(own + i * trials, count);
      const Vec<S> mean = sum * part;
      for (long i = 0; i < n; i++) {
        Vec<S> gap = load<S>(own + i * trials, count) - mean;
        square += gap * gap;
      }
      Vec<S> scale = square * part + S(*eps);
      for (int j = 0; j < L; j++) scale[j] = S(1) / std::sqrt(scale[j]);
      for (long i = 0; i < n; i++) store<S>(to_z + i * trials, count, (load<S>(own + i * trials, count) - mean) * scale);
      store<S>(r + c * trials + t, count, scale);
    }
}
// out = r P u with P u = u - mean(u) - z mean(u z); dot = sum(u z) and total = sum(u).
template <class S>
static void project(const S* u, const S* z, const S* r, S* out, S* dot, S* total, long n, long trials, long from, long to) {
  constexpr int L = Lanes<S>::COUNT;
  const S part = S(1) / S(n);
  for (long c = from; c < to; c++)
    for (long t = 0; t < trials; t += L) {
      const int count = trials - t < L ? (int)(trials - t) : L;
      const long begin = c * n * trials + t;
      Vec<S> sum{}, along{};
      for (long i = 0; i < n; i++) {
        Vec<S> own = load<S>(u + begin + i * trials, count);
        sum += own, along += own * load<S>(z + begin + i * trials, count);
      }
      const Vec<S> mean = sum * part, slope = along * part, scale = load<S>(r + c * trials + t, count);
      for (long i = 0; i < n; i++)
        store<S>(out + begin + i * trials, count,
                 scale * (load<S>(u + begin + i * trials, count) - mean - load<S>(z + begin + i * trials, count) * slope));
      store<S>(dot + c * trials + t, count, along);
      store<S>(total + c * trials + t, count, sum);
    }
}

// Rows of gradients x and y [n][T]: the products <x, y> and <x, x> of each trial, or the squares of x - y, in one pass.
// Rows are the outer loop and COLUMNS registers of trials the inner one; every 256 rows are added up by themselves, which
// loses less to rounding.
template <class S, int COLUMNS, bool GAP>
static inline void products_of(const S* x, const S* y, S* dot, S* square, long n, long trials, long t, int count) {
  constexpr int L = Lanes<S>::COUNT;
  Vec<S> dots[COLUMNS] = {}, squares[COLUMNS] = {};
  for (long i = 0; i < n;) {
    Vec<S> by_y[COLUMNS] = {}, by_x[COLUMNS] = {};
    for (long end = i + 256 < n ? i + 256 : n; i < end; i++)
      EACH for (int j = 0; j < COLUMNS; j++) {
        Vec<S> a = load<S>(x + i * trials + t + j * L, count), b = load<S>(y + i * trials + t + j * L, count);
        if (GAP) a -= b;
        by_x[j] += a * a;
        if (!GAP) by_y[j] += a * b;
      }
    EACH for (int j = 0; j < COLUMNS; j++) dots[j] += by_y[j], squares[j] += by_x[j];
  }
  for (int j = 0; j < COLUMNS; j++) {
    store<S>(square + t + j * L, count, squares[j]);
    if (!GAP) store<S>(dot + t + j * L, count, dots[j]);
  }
}
template <class S> static long columns(long trials) { return (trials + Lanes<S>::COUNT - 1) / Lanes<S>::COUNT; }
template <class S, bool GAP>
static void products(const S* x, const S* y, S* dot, S* square, long n, long trials, long from, long to) {
  constexpr int L = Lanes<S>::COUNT;
  long t = from * L, end = to * L < trials ? to * L : trials;
  for (; t + 4 * L <= end; t += 4 * L) products_of<S, 4, GAP>(x, y, dot, square, n, trials, t, L);
  for (; t + 2 * L <= end; t += 2 * L) products_of<S, 2, GAP>(x, y, dot, square, n, trials, t, L);
  for (; t + L <= end; t += L) products_of<S, 1, GAP>(x, y, dot, square, n, trials, t, L);
  if (t < end) products_of<S, 1, GAP>(x, y, dot, square, n, trials, t, (int)(end - t));
}

// out[i][t] = x[i][t] a[t] + y[i][t] b[t]: the derivative of any function of those products. Loops as above.
template <class S, int COLUMNS>
static inline void combine_of(const S* x, const S* a, const S* y, const S* b, S* out, long n, long trials, long t, int count) {
  constexpr int L = Lanes<S>::COUNT;
  Vec<S> by_x[COLUMNS], by_y[COLUMNS];
  for (int j = 0; j < COLUMNS; j++) by_x[j] = load<S>(a + t + j * L, count), by_y[j] = load<S>(b + t + j * L, count);
  for (long i = 0; i < n; i++)
    EACH for (int j = 0; j < COLUMNS; j++) {
      long place = i * trials + t + j * L;
      store<S>(out + place, count, load<S>(x + place, count) * by_x[j] + load<S>(y + place, count) * by_y[j]);
    }
}
template <class S> static void combine(const S* x, const S* a, const S* y, const S* b, S* out, long n, long trials) {
  constexpr int L = Lanes<S>::COUNT;
  long t = 0;
  for (; t + 4 * L <= trials; t += 4 * L) combine_of<S, 4>(x, a, y, b, out, n, trials, t, L);
  for (; t + 2 * L <= trials; t += 2 * L) combine_of<S, 2>(x, a, y, b, out, n, trials, t, L);
  for (; t + L <= trials; t += L) combine_of<S, 1>(x, a, y, b, out, n, trials, t, L);
  if (t < trials) combine_of<S, 1>(x, a, y, b, out, n, trials, t, (int)(trials - t));
}

// The mean of |x[y][x + 1] - x[y][x]| plus that of |x[y + 1][x] - x[y][x]| over the planes [planes][height][width] of each
// trial; ``weight`` [T] times its derivative is added to ``by``, in one pass over the pixels. Here neighbouring pixels of a
// row share a register. Rows are copied between two pixels more, so that a pixel at the edge is its own neighbour.
template <class S>
static void variation(const S* x, const S* weight, S* value, S* by, long planes, long height, long width, long from, long to) {
  constexpr int L = Lanes<S>::COUNT;
  using V = Vec<S>;
  const S along = S(1) / S(planes * height * (width - 1)), down = S(1) / S(planes * (height - 1) * width);
  const long length = (width + 2 + 2 * L) / L * L;
  S* rows = (S*)buffer<S>(SPARE, 3 * length / L);
  memset(rows, 0, sizeof(S) * 3 * length);
  auto fill = [&](S* row, const S* plane, long y) {
    const S* own = plane + y * width;
    memcpy(row + 1, own, sizeof(S) * width);
    row[0] = own[0], row[width + 1] = own[width - 1];
  };
  auto sign = [](V gap, V part) { return gap > S(0) ? part : gap < S(0) ? -part : V{}; };
  auto size = [](V gap) { return gap > S(0) ? gap : -gap; };
  for (long t = from; t < to; t++) {
    const V by_along = V{} + along * weight[t], by_down = V{} + down * weight[t];
    V sum_along{}, sum_down{};
    for (long p = t * planes; p < (t + 1) * planes; p++) {
      const S* plane = x + p * height * width;
      S *above = rows, *row = rows + length, *below = rows + 2 * length;
      fill(row, plane, 0), fill(above, plane, 0);
      for (long y = 0; y < height; y++) {
        fill(below, plane, y + 1 < height ? y + 1 : y);
        S* out = by + (p * height + y) * width;
        for (long i = 0; i < width; i += L) {
          const int count = width - i < L ? (int)(width - i) : L;
          V own = load<S>(row + i + 1, count), left = load<S>(row + i, count), right = load<S>(row + i + 2, count);
          V over = load<S>(above + i + 1, count), under = load<S>(below + i + 1, count);
          sum_along += size(right - own), sum_down += size(under - own);
          V all = sign(own - left, by_along) - sign(right - own, by_along) + sign(own - over, by_down) - sign(under - own, by_down);
          store<S>(out + i, count, load<S>(out + i, count) + all);
        }
        S* spare = above;
        above = row, row = below, below = spare;
      }
    }
    value[t] = total<S>(sum_along) * along + total<S>(sum_down) * down;
  }
}

#define ARGUMENTS(S) \
  const Program *program, const Parameter *parameters, Rows x, Rows q, S *memory, long trials, long blocks, long threads
extern "C" {
int lanes_bytes() { return BYTES; }
#define FUNCTIONS(S, NAME)                                                                                               \
  int gradient_##NAME(ARGUMENTS(S)) {                                                                                   \
    IN_THREADS(blocks, gradient<S>(*program, parameters, x, q, memory, trials, from, to));                              \
  }                                                                                                                     \
  int derivative_##NAME(ARGUMENTS(S)) {                                                                                 \
    IN_THREADS(blocks, derivative<S>(*program, parameters, x, q, memory, trials, from, to));                            \
  }                                                                                                                     \
  int meet_##NAME(const Program* program, const Parameter* parameters, S* memory, long trials, long group, long count,    \
                   long parts, long threads) {                                                                          \
    IN_THREADS(parts, meet<S>(*program, parameters, memory, trials, group, count, from, to));                           \
  }                                                                                                                     \
  int standardise_##NAME(const S* x, S* z, S* r, const double* eps, long n, long trials, long channels, long threads) {  \
    IN_THREADS(channels, standardise(x, z, r, eps, n, trials, from, to));                                               \
  }                                                                                                                     \
  int project_##NAME(const S* u, const S* z, const S* r, S* out, S* dot, S* total, long n, long trials, long channels,  \
                      long threads) {                                                                                   \
    IN_THREADS(channels, project(u, z, r, out, dot, total, n, trials, from, to));                                       \
  }                                                                                                                     \
  int map_##NAME(const Op* q, long which, const Operand* x, const Operand* w, const Operand* y, long images, long trials,  \
                  long blocks, long threads) {                                                                          \
    IN_THREADS(blocks, map<S>(*q, which, *x, *w, *y, images, trials, from, to));                                        \
  }                                                                                                                     \
  int products_##NAME(const S* x, const S* y, S* dot, S* square, long n, long trials, long threads) {                   \
    IN_THREADS(columns<S>(trials), products<S, false>(x, y, dot, square, n, trials, from, to));                         \
  }                                                                                                                     \
  int gap_##NAME(const S* x, const S* y, S* square, long n, long trials, long threads) {                                \
    IN_THREADS(columns<S>(trials), products<S, true>(x, y, nullptr, square, n, trials, from, to));                      \
  }                                                                                                                     \
  int combine_##NAME(const S* x, const S* a, const S* y, const S* b, S* out, long n, long trials, long threads) {       \
    IN_THREADS(n, combine(x + from * trials, a, y + from * trials, b, out + from * trials, to - from, trials));         \
  }                                                                                                                     \
  int variation_##NAME(const S* x, const S* weight, S* value, S* by, long planes, long height, long width, long trials,  \
                        long threads) {                                                                                 \
    IN_THREADS(trials, variation(x, weight, value, by, planes, height, width, from, to));                               \
  }
FUNCTIONS(float, float)
FUNCTIONS(double, double)
}
