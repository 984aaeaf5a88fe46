// The kernels of int8_conv2d that compilers turn into vectors by themselves. Included by one
// translation unit per instruction set, inside its anonymous namespace.

void range(const float* x, int64_t count, ConvRange* range) {
  // Positive floats order as their bits do, and negative ones are negative integers.
  int32_t high = range->high, low = range->low;
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof(bits));
    const int32_t turned = bits ^ INT32_MIN;
    high = bits > high ? bits : high;
    low = turned > low ? turned : low;
  }
  range->high = high;
  range->low = low;
}

inline void quantize_run(const float* x, int64_t count, ConvQuantization to, uint8_t* codes) {
  // Adding 1.5 · 2^23 leaves no bits for a fraction: to the nearest, halves to even.
  constexpr float kRound = 12582912.0f;
  const float low = (float)to.low, offset = (float)to.offset;
  for (int64_t i = 0; i < count; ++i) {
    float scaled = x[i] * to.inverse;
    scaled = scaled == scaled ? scaled : 0.0f;  // 0 · Inf, where max|x| is subnormal
    scaled = scaled < -1000.0f ? -1000.0f : scaled > 1000.0f ? 1000.0f : scaled;
    float code = (scaled + kRound) - kRound + offset;
    code = code < low ? low : code > 255.0f ? 255.0f : code;
    codes[i] = (uint8_t)(int)code;
  }
}

void quantize_pixels(const float* x, int64_t pixel, int64_t channels, int64_t pixels,
                     ConvQuantization to, uint8_t* codes, int64_t pixel_bytes) {
  if (pixel == channels && pixel_bytes == channels) {
    channels *= pixels;
    pixels = 1;
  }
  for (int64_t p = 0; p < pixels; ++p)
    quantize_run(x + p * pixel, channels, to, codes + p * pixel_bytes);
}

void quantize_planes(const float* x, int64_t plane, int64_t channels, int64_t pixels,
                     ConvQuantization to, uint8_t* codes, int64_t pixel_bytes) {
  constexpr int64_t kPiece = 64;
  uint8_t piece[kPiece];
  for (int64_t first = 0; first < pixels; first += kPiece) {
    const int64_t count = pixels - first < kPiece ? pixels - first : kPiece;
    for (int64_t c = 0; c < channels; ++c) {
      quantize_run(x + c * plane + first, count, to, piece);
      uint8_t* at = codes + first * pixel_bytes + c;
      for (int64_t p = 0; p < count; ++p) at[p * pixel_bytes] = piece[p];
    }
  }
}

void multiply_depthwise(const uint8_t* const* pixels, const ConvRun* runs, int64_t run_count,
                        const int8_t* weight, int rows, int32_t* sums, int64_t sums_stride) {
  for (int m = 0; m < rows; ++m) {
    uint32_t total[kConvColumns] = {};
    for (int64_t t = 0; t < run_count; ++t) {
      const uint8_t* x = pixels[m] + runs[t].offset;
      const int8_t* w = weight + t * kConvColumns;
      for (int n = 0; n < kConvColumns; ++n) total[n] += (uint32_t)((int)x[n] * (int)w[n]);
    }
    __builtin_memcpy(sums + m * sums_stride, total, sizeof(total));
  }
}

void finish(const int32_t* sums, int64_t sums_stride, int64_t pixels, int64_t columns,
            const ConvOutput& output, float* out, int64_t pixel_stride, int64_t channel_stride) {
  for (int64_t first = 0; first < columns; first += kConvColumns) {
    const int64_t count = columns - first < kConvColumns ? columns - first : kConvColumns;
    uint32_t shift[kConvColumns];
    float scale[kConvColumns], bias[kConvColumns];
    for (int64_t n = 0; n < count; ++n) {
      // Modulo 2^32: codes that are not centred may carry a sum past 2^31.
      shift[n] = (uint32_t)output.offset * (uint32_t)output.sums[first + n];
      scale[n] = output.x_scale * output.scales[first + n];
      bias[n] = output.bias == nullptr ? 0.0f : output.bias[first + n];
    }
    for (int64_t m = 0; m < pixels; ++m) {
      const int32_t* sum = sums + m * sums_stride + first;
      float row[kConvColumns];
      for (int64_t n = 0; n < count; ++n) {
        float y = (float)(int32_t)((uint32_t)sum[n] - shift[n]) * scale[n];
        if (output.bias != nullptr) y += bias[n];
        row[n] = output.relu && y < 0.0f ? 0.0f : y;  // keeps NaN
      }
      float* to = out + m * pixel_stride + first * channel_stride;
      for (int64_t n = 0; n < count; ++n) to[n * channel_stride] = row[n];
    }
  }
}
