// The body of bsr_linear's kernels, bsr_conv2d's and bsr_int8_linear's, written once over vectors
// of kLanes items. Included by one translation unit per instruction set and number, inside its
// anonymous namespace, after that set's simd header and
//   kMostRows         rows of the largest register block of `multiply`
//   kNarrowRows       outputs of the largest of `multiply_narrow` and `multiply_pixels`
//   kIntegers         whether items are 4 int8
//   add_products      sums plus x times weights, all of them bits of vectors of kLanes items
//   add_sums          sums plus sums
//
// A register block is Rows × 16 sums, which stay in registers over all blocks of a strip. A step
// reads one line of the strip and broadcasts one item a row of x: with AVX-512 that is an operand
// of the FMA itself, so that 24 FMAs take 24 cycles beside 25 loads. Rows of x across a vector with
// broadcast weights would be as fast, but leave the sums transposed.

constexpr int kVectors = kStrip / kLanes;
// The next blocks of a strip come from L3 or memory. Strips follow each other there, so that up to
// kFewRows rows, which leave the loads no time, are served better by the processor's own
// prefetchers alone; more rows read too slowly for those.
constexpr int64_t kAhead = 3072;
constexpr int kFewRows = 2;

template <int... I>
inline Vec broadcast(const float* item, Indices<I...>) {
  return Vec{((void)I, *item)...};
}
inline Vec broadcast(const float* item) { return broadcast(item, typename UpTo<kLanes>::type()); }

// ---- panels ------------------------------------------------------------------------------------

template <typename E>
void pack_elements(const typename E::Storage* x, int64_t x_stride, int64_t rows, int64_t count,
                   float* panel, int64_t width, int64_t panel_stride) {
  for (int64_t k = 0; k < count; k += kLanes) {
    const int64_t inputs = count - k < kLanes ? count - k : kLanes;
    for (int64_t m = 0; m < width; m += kLanes) {
      const int64_t lanes = width - m < kLanes ? width - m : kLanes;
      const int64_t here = rows - m < lanes ? rows - m : lanes;
      Vec block[kLanes];
      const auto* from = x + m * x_stride + k;
      float* to = panel + k * panel_stride + m;
      if (here == kLanes && inputs == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = E::get(from + i * x_stride);
      } else {
        for (int i = 0; i < kLanes; ++i)
          block[i] = i < here ? E::get_first(from + i * x_stride, inputs) : Vec{};
      }
      transpose(block);
      if (lanes == kLanes && inputs == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + i * panel_stride, block[i]);
      } else {
        for (int64_t i = 0; i < inputs; ++i) store_first(to + i * panel_stride, lanes, block[i]);
      }
    }
  }
}

template <typename E, int... I>
inline Vec get_even(const typename E::Storage* from, int64_t count, Indices<I...>) {
  const Vec low = E::get_first(from, count < kLanes ? count : kLanes);
  const Vec high = count > kLanes ? E::get_first(from + kLanes, count - kLanes) : Vec{};
  return __builtin_shufflevector(low, high, (2 * I)...);
}

template <typename E>
void copy_elements(const typename E::Storage* from, int64_t stride, int64_t step, int64_t rows,
                   int64_t columns, float* to, int64_t to_stride) {
  for (int64_t row = 0; row < rows; ++row, from += stride, to += to_stride) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      const auto* at = from + column * step;
      const int64_t count = columns - column < kLanes ? columns - column : kLanes;
      if (step > 2) {
        for (int64_t i = 0; i < count; ++i) to[column + i] = E::get_first(at + i * step, 1)[0];
      } else if (step == 2) {
        store_first(to + column, count,
                    get_even<E>(at, 2 * count - 1, typename UpTo<kLanes>::type()));
      } else if (count == kLanes) {
        store(to + column, E::get(at));
      } else {
        store_first(to + column, count, E::get_first(at, count));
      }
    }
  }
}

void pack(const void* x, Element element, int64_t x_stride, int64_t rows, int64_t count,
          float* panel, int64_t width, int64_t panel_stride) {
  if (element == Element::kFloat)
    pack_elements<Float>((const float*)x, x_stride, rows, count, panel, width, panel_stride);
  else if (element == Element::kHalf)
    pack_elements<Half>((const uint16_t*)x, x_stride, rows, count, panel, width, panel_stride);
  else
    pack_elements<BFloat16>((const uint16_t*)x, x_stride, rows, count, panel, width, panel_stride);
}

void copy(const void* from, Element element, int64_t stride, int64_t step, int64_t rows,
          int64_t columns, float* to, int64_t to_stride) {
  if (element == Element::kFloat)
    copy_elements<Float>((const float*)from, stride, step, rows, columns, to, to_stride);
  else if (element == Element::kHalf)
    copy_elements<Half>((const uint16_t*)from, stride, step, rows, columns, to, to_stride);
  else
    copy_elements<BFloat16>((const uint16_t*)from, stride, step, rows, columns, to, to_stride);
}

// ---- products ----------------------------------------------------------------------------------

// step(chain) `count` times, of alternating chains: a sum takes the next product only after the
// latency of one, 4 cycles.
template <int Chains, typename Step>
inline void in_chains(int64_t count, const Step& step) {
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + Chains <= count; i += Chains)
#pragma GCC unroll 4
    for (int chain = 0; chain < Chains; ++chain) step(chain);
  for (; i < count; ++i) step(0);
}

// Chains that `sums` vectors of sums need.
constexpr int chains(int sums) { return sums >= 4 ? 1 : sums >= 2 ? 2 : 4; }

// The chains together.
template <int Chains, int Rows>
inline void store_sums(const Vec (&partial)[Chains][Rows][kVectors], float* sums) {
#pragma GCC unroll 24
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vec sum = partial[0][i][v];
      for (int chain = 1; chain < Chains; ++chain) sum = add_sums(sum, partial[chain][i][v]);
      store(sums + i * kStrip + v * kLanes, sum);
    }
}

// Of a strip of 16 outputs and Rows rows of x.
template <typename E, int Rows>
void multiply_rows(const BsrStrip& strip, const float* panel, float* sums) {
  constexpr int kChains = chains(Rows * kVectors);
  Vec partial[kChains][Rows][kVectors] = {};
  const auto* w = (const typename E::Storage*)strip.values;
  const int64_t depth = strip.depth;
  for (int64_t block = 0; block < strip.blocks; ++block) {
    const float* x = panel + strip.columns[block] * depth * Rows;
    in_chains<kChains>(depth, [&](int chain) {
      Vec weights[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) weights[v] = E::get(w + v * kLanes);
      if constexpr (Rows > kFewRows) __builtin_prefetch((const char*)w + kAhead);
#pragma GCC unroll 24
      for (int i = 0; i < Rows; ++i) {
        const Vec item = broadcast(x + i);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          partial[chain][i][v] = add_products(partial[chain][i][v], item, weights[v]);
      }
      w += kStrip, x += Rows;
    });
  }
  store_sums(partial, sums);
}

template <typename E, int Rows = kMostRows>
void multiply_elements(const BsrStrip& strip, const float* panel, int width, float* sums) {
  constexpr int kFewer = Rows > 8 ? Rows - 2 : Rows - 1;
  if (width == Rows) return multiply_rows<E, Rows>(strip, panel, sums);
  if constexpr (kFewer > 0) multiply_elements<E, kFewer>(strip, panel, width, sums);
}

void multiply(const BsrStrip& strip, Element element, const float* panel, int width, float* sums) {
  if (kIntegers || element == Element::kFloat)
    return multiply_elements<Float>(strip, panel, width, sums);
  if constexpr (!kIntegers) {
    if (element == Element::kHalf)
      multiply_elements<Half>(strip, panel, width, sums);
    else
      multiply_elements<BFloat16>(strip, panel, width, sums);
  }
}

template <typename E>
void multiply_strips(const BsrStrip* strips, int64_t count, const float* row, float* sums) {
  for (int64_t i = 0; i < count; ++i) multiply_rows<E, 1>(strips[i], row, sums + i * kStrip);
}

void multiply_row(const BsrStrip* strips, int64_t count, Element element, const float* row,
                  float* sums) {
  if (kIntegers || element == Element::kFloat)
    return multiply_strips<Float>(strips, count, row, sums);
  if constexpr (!kIntegers) {
    if (element == Element::kHalf)
      multiply_strips<Half>(strips, count, row, sums);
    else
      multiply_strips<BFloat16>(strips, count, row, sums);
  }
}

// Of Rows outputs and 16 rows of x, whose sums begin with `initial`. each(step) calls
// step(chain, items) for every input, with its items of these rows; `w` has `stride` outputs of it.
template <int Rows, typename Each>
inline void multiply_outputs(const float* w, int64_t stride, const float* initial, float* sums,
                             const Each& each) {
  constexpr int kChains = chains(Rows * kVectors);
  Vec partial[kChains][Rows][kVectors] = {};
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) partial[0][i][v] = broadcast(initial + i);
  each([&](int chain, const Vec* items) {
    __builtin_prefetch((const char*)w + kAhead);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec weight = broadcast(w + i);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        partial[chain][i][v] = add_products(partial[chain][i][v], items[v], weight);
    }
    w += stride;
  });
  store_sums(partial, sums);
}

constexpr float kZeros[kStrip] = {};

template <int Rows = kNarrowRows>
void multiply_narrow(const BsrStrip& strip, const float* panel, float* sums) {
  if (strip.r >= Rows) {
    for (int first = 0; first < strip.r; first += Rows)
      multiply_outputs<Rows>((const float*)strip.values + first, strip.r, kZeros,
                             sums + first * kStrip, [&](auto&& step) {
                               for (int64_t block = 0; block < strip.blocks; ++block) {
                                 const float* x =
                                     panel + strip.columns[block] * strip.depth * kStrip;
                                 in_chains<chains(Rows * kVectors)>(strip.depth, [&](int chain) {
                                   Vec items[kVectors];
#pragma GCC unroll 4
                                   for (int v = 0; v < kVectors; ++v)
                                     items[v] = load(x + v * kLanes);
                                   step(chain, items), x += kStrip;
                                 });
                               }
                             });
  } else if constexpr (Rows > 1) {
    multiply_narrow<Rows / 2>(strip, panel, sums);
  }
}

typedef float Eight __attribute__((vector_size(kHalf * 4)));
typedef float EightUnaligned __attribute__((vector_size(kHalf * 4), aligned(4), may_alias));

template <int... I>
inline Vec joined(Eight low, Eight high, Indices<I...>) {
  return __builtin_shufflevector(low, high, I...);
}

inline void load_halves(const float* low, const float* high, Vec* items) {
  if constexpr (kLanes > kHalf) {
    items[0] = joined(*(const EightUnaligned*)low, *(const EightUnaligned*)high,
                      typename UpTo<kStrip>::type());
  } else {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      items[v] = load(v * kLanes < kHalf ? low + v * kLanes : high + (v * kLanes - kHalf));
  }
}

template <int Rows = kNarrowRows>
void multiply_pixels(const float* weights, int r, const int64_t* offsets, int64_t inputs,
                     const float* const* pixels, const float* bias, float* sums) {
  if (r >= Rows) {
    const float *low = pixels[0], *high = pixels[1];
    for (int first = 0; first < r; first += Rows)
      multiply_outputs<Rows>(weights + first, r, bias + first, sums + first * kStrip,
                             [&](auto&& step) {
                               const int64_t* at = offsets;
                               in_chains<chains(Rows * kVectors)>(inputs, [&](int chain) {
                                 Vec items[kVectors];
                                 load_halves(low + *at, high + *at, items);
                                 step(chain, items), ++at;
                               });
                             });
  } else if constexpr (Rows > 1) {
    multiply_pixels<Rows / 2>(weights, r, offsets, inputs, pixels, bias, sums);
  }
}

// ---- the last steps ----------------------------------------------------------------------------

template <typename E>
void finish_elements(const float* sums, const BsrFinish& how) {
  const Vec zero = {};
  for (int64_t column = 0; column < how.columns; column += kLanes) {
    const int64_t count = how.columns - column < kLanes ? how.columns - column : kLanes;
    const Vec bias = how.bias == nullptr ? zero : load_first(how.bias + column, count);
    auto* y = (typename E::Storage*)how.y + column;
    for (int64_t m = 0; m < how.rows; ++m, y += how.y_stride) {
      Vec value = load(sums + m * kStrip + column) + bias;
      if (how.relu) value = value < zero ? zero : value;  // keeps NaN
      if (count == kLanes)
        E::put(y, value);
      else
        E::put_first(y, count, value);
      // The next strip's outputs come into the cache while they are summed.
      __builtin_prefetch(y + kStrip, 1);
    }
  }
}

void finish(float* sums, const BsrFinish& how) {
  BsrFinish rest = how;
  if (how.gelu != nullptr) {
    if (how.bias != nullptr) {
      BsrFinish biased{how.rows, how.columns,     how.bias, false,
                       nullptr,  Element::kFloat, sums,     kStrip};
      finish_elements<Float>(sums, biased);
    }
    how.gelu(sums, (how.rows - 1) * kStrip + (how.columns + kStrip - 1) / kStrip * kStrip);
    rest.bias = nullptr;
  }
  if (how.element == Element::kFloat)
    finish_elements<Float>(sums, rest);
  else if (how.element == Element::kHalf)
    finish_elements<Half>(sums, rest);
  else
    finish_elements<BFloat16>(sums, rest);
}

constexpr BsrLinearKernels kernels(const char* isa,
                                   void (*scale)(float*, int64_t, int64_t, const BsrScales&)) {
  return {isa,
          kMostRows,
          pack,
          copy,
          multiply,
          multiply_row,
          multiply_narrow<>,
          kIntegers ? nullptr : multiply_pixels<>,
          scale,
          finish};
}
