// Images to windows of 16 channels and back: the part of winograd_conv2d_simd.h, which includes it,
// that knows strides and element types.

// `count` values `stride` apart; the other lanes are 0.
template <typename T>
inline Vec get_strided(const typename T::Storage* from, ptrdiff_t stride, int64_t count) {
  if (stride == 1) return T::get_first(from, count);
  typename T::Storage values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = from[i * stride];
  return T::get(values);
}

template <typename T>
inline void put_strided(typename T::Storage* to, ptrdiff_t stride, int64_t count, Vec value) {
  if (stride == 1) return T::put_first(to, count, value);
  typename T::Storage values[kLanes];
  T::put(values, value);
  for (int64_t i = 0; i < count; ++i) to[i * stride] = values[i];
}

inline int64_t clipped(int64_t count) { return count < 0 ? 0 : count > kLanes ? kLanes : count; }

// A last block that is not full begins earlier, over columns that are already done.
inline int64_t block_start(int64_t next, int64_t columns) {
  return next + kLanes > columns && columns >= kLanes ? columns - kLanes : next;
}

template <typename T>
void gather_elements(const typename T::Storage* image, ImageStrides strides, int64_t channels,
                     int64_t rows, int64_t columns, float* window, int64_t window_row) {
  for (int64_t row = 0; row < rows; ++row) {
    const auto* line = image + row * strides.h;
    float* to = window + row * window_row;
    if (strides.w == 1 && strides.c != 1) {
      for (int64_t next = 0; next < columns; next += kLanes) {
        const int64_t column = block_start(next, columns), width = clipped(columns - column);
        for (int part = 0; part < kParts; ++part) {
          const int64_t count = clipped(channels - part * kLanes);
          Vec block[kLanes];
          const auto* corner = line + column + part * kLanes * strides.c;
          if (width == kLanes && count == kLanes) {
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
              block[i] = T::get(corner + i * strides.c);
              // Short pieces of 16 planes: the hardware does not see what comes next, the rows
              // below.
              __builtin_prefetch(corner + i * strides.c + strides.h * rows);
            }
          } else {
            for (int i = 0; i < kLanes; ++i)
              block[i] = i < count ? T::get_first(corner + i * strides.c, width) : Vec{};
          }
          transpose(block);
          if (width == kLanes) {
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i)
              store(to + (column + i) * kBlock + part * kLanes, block[i]);
          } else {
            for (int64_t i = 0; i < width; ++i)
              store(to + (column + i) * kBlock + part * kLanes, block[i]);
          }
        }
      }
    } else {
      for (int64_t column = 0; column < columns; ++column)
        for (int part = 0; part < kParts; ++part) {
          const int64_t count = clipped(channels - part * kLanes);
          const auto* from = line + column * strides.w + part * kLanes * strides.c;
          store(to + column * kBlock + part * kLanes, strides.c == 1 && count == kLanes
                                                          ? T::get(from)
                                                          : get_strided<T>(from, strides.c, count));
        }
    }
  }
}

template <typename T>
void scatter_elements(const float* window, int64_t window_row, int64_t channels, int64_t rows,
                      int64_t columns, ImageStrides strides, typename T::Storage* image) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = window + row * window_row;
    auto* line = image + row * strides.h;
    if (strides.w == 1 && strides.c != 1) {
      for (int64_t next = 0; next < columns; next += kLanes) {
        const int64_t column = block_start(next, columns), width = clipped(columns - column);
        for (int part = 0; part < kParts; ++part) {
          const int64_t count = clipped(channels - part * kLanes);
          if (count == 0) continue;
          Vec block[kLanes];
          // Where there are fewer columns than lanes, what is read past them is not used.
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i)
            block[i] = load(from + (column + i) * kBlock + part * kLanes);
          transpose(block);
          auto* corner = line + column + part * kLanes * strides.c;
          if (width == kLanes && count == kLanes) {
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) T::put(corner + i * strides.c, block[i]);
          } else {
            for (int64_t i = 0; i < count; ++i)
              T::put_first(corner + i * strides.c, width, block[i]);
          }
        }
      }
    } else {
      for (int64_t column = 0; column < columns; ++column)
        for (int part = 0; part < kParts; ++part) {
          const int64_t count = clipped(channels - part * kLanes);
          const Vec value = load(from + column * kBlock + part * kLanes);
          auto* to = line + column * strides.w + part * kLanes * strides.c;
          if (strides.c == 1 && count == kLanes)
            T::put(to, value);
          else
            put_strided<T>(to, strides.c, count, value);
        }
    }
  }
}

void gather(const void* image, Element element, ImageStrides strides, int64_t channels,
            int64_t rows, int64_t columns, float* window, int64_t window_row) {
  if (element == Element::kFloat)
    return gather_elements<Float>((const float*)image, strides, channels, rows, columns, window,
                                  window_row);
  const auto gather_short =
      element == Element::kHalf ? gather_elements<Half> : gather_elements<BFloat16>;
  gather_short((const uint16_t*)image, strides, channels, rows, columns, window, window_row);
}

void scatter(const float* window, int64_t window_row, int64_t channels, int64_t rows,
             int64_t columns, Element element, ImageStrides strides, void* image) {
  if (element == Element::kFloat)
    return scatter_elements<Float>(window, window_row, channels, rows, columns, strides,
                                   (float*)image);
  const auto scatter_short =
      element == Element::kHalf ? scatter_elements<Half> : scatter_elements<BFloat16>;
  scatter_short(window, window_row, channels, rows, columns, strides, (uint16_t*)image);
}
