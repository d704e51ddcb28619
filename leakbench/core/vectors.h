// Registers of several numbers, for the compiled sources of the package.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#if __has_include(<dlfcn.h>)
#include <dlfcn.h>
#endif
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#ifndef LANE_BYTES  // the size of a register that is built for: the processor's largest, if the build does not say
#ifdef __AVX512F__
#define LANE_BYTES 64
#else
#define LANE_BYTES 32
#endif
#endif
constexpr int BYTES = LANE_BYTES;

// Numbers too small to be normal ones (below 1e-38 in float32) are zeros while it lives: some processors take a hundred
// times as long for them, and the gradient of a sigmoid that is saturated is full of them.
struct Flushed {
#ifdef __SSE__
  unsigned before = _mm_getcsr();
  Flushed() { _mm_setcsr(before | 0x8040); }
  ~Flushed() { _mm_setcsr(before); }
#endif
};

// Calls ``work(from, to)`` for parts of 0 to ``count`` in the threads of torch's own operations, which OpenMP's library has.
// Such a thread looks for more work for some milliseconds after its last, so that threads of our own would wait for its core.
// Where there is no such library, the calling thread does it all. Returns 0, or 1 where a part found too little memory, which
// Python turns into an error (``checked``): no exception may pass through OpenMP's threads or through C.
typedef void (*Team)(void (*)(void*), void*, unsigned, unsigned);
static Team torchs_threads() {
#if __has_include(<dlfcn.h>)
  return (Team)dlsym(RTLD_DEFAULT, "GOMP_parallel");
#else
  return nullptr;
#endif
}
template <class F> static int in_threads(int64_t count, int64_t threads, F&& work) {
  struct Job {
    F& work;
    int64_t count, parts;
    std::atomic<int64_t> next{0};
    std::atomic<int> status{0};
  } job{work, count, threads < count ? threads : count};
  auto take = [](void* given) {
    Flushed flushed;
    Job& own = *(Job*)given;
    try {
      for (int64_t i; (i = own.next++) < own.parts;) own.work(own.count * i / own.parts, own.count * (i + 1) / own.parts);
    } catch (const std::bad_alloc&) {
      own.status = 1;
    }
  };
  static const Team team = torchs_threads();
  if (job.parts < 2 || !team) take(&job);
  else team(take, &job, threads, 0);
  return job.status;
}

// A call with ``from`` and ``to``, in as many threads as an exported function is given, which returns the status.
#define IN_THREADS(COUNT, ...) return in_threads(COUNT, threads, [&](int64_t from, int64_t to) { __VA_ARGS__; })

template <class S> struct Lanes {
  typedef S Vector __attribute__((vector_size(BYTES)));
  static constexpr int COUNT = BYTES / sizeof(S);
};
template <class S> using Vec = typename Lanes<S>::Vector;
#define EACH _Pragma("GCC unroll 8")

template <class S> static inline Vec<S> load(const S* from) {
  Vec<S> v;
  memcpy(&v, from, BYTES);
  return v;
}
template <class S> static inline void store(S* to, const Vec<S>& v) { memcpy(to, &v, BYTES); }
template <class S> static inline S total(const Vec<S>& v) {
  S sum = 0;
  for (int i = 0; i < Lanes<S>::COUNT; i++) sum += v[i];
  return sum;
}

// exp(x) = 2^n exp(r) with |r| <= log(2) / 2, by Taylor's series of the degree at which it ends in rounding.
template <class S> static inline Vec<S> exponential(Vec<S> x) {
  using V = Vec<S>;
  constexpr bool SINGLE = sizeof(S) == 4;
  using I = decltype(x < x);
  constexpr int BITS = SINGLE ? 23 : 52, BIAS_OF = SINGLE ? 127 : 1023, DEGREE = SINGLE ? 7 : 13;
  const S limit = SINGLE ? S(87) : S(708), shift = SINGLE ? S(12582912.0) : S(6755399441055744.0);
  x = x < -limit ? V{} - limit : x;
  x = x > limit ? V{} + limit : x;
  V n = (x * S(1.4426950408889634) + shift) - shift;  // rounds to the nearest whole number
  V r = x - n * (SINGLE ? S(0.693359375) : S(0.693147180369123816490));
  r -= n * (SINGLE ? S(-2.12194440e-4) : S(1.90821492927058770002e-10));
  static constexpr double FACTORIAL[14] = {1, 1, 2, 6, 24, 120, 720, 5040, 40320, 362880, 3628800, 39916800,
                                           479001600, 6227020800};
  V sum = V{} + S(1 / FACTORIAL[DEGREE]);
  EACH for (int k = DEGREE - 1; k >= 0; k--) sum = sum * r + S(1 / FACTORIAL[k]);
  I power = (__builtin_convertvector(n, I) + BIAS_OF) << BITS;
  V scale;
  memcpy(&scale, &power, BYTES);
  return sum * scale;
}
