// Training steps of small networks on a CPU with AVX-512 and its bfloat16 instructions; loaded by cpu_kernels.py.
//
// Maps are bfloat16 (N, C, H, W) in channels-last memory, seen here as rows of C values: one row per pixel, `stride`
// values apart. A slice of channels has such rows too, so gradients of a concatenation need no copy. Sums are float32
// over 512 rows and float64 beyond.
#include <ATen/Parallel.h>
#include <immintrin.h>
#include <torch/extension.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

using at::BFloat16;
using at::Tensor;

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t CHUNK = 512;

__mmask16 lanes(int64_t c, int64_t channels) {
  return channels - c >= LANES ? 0xFFFF : static_cast<__mmask16>((1u << (channels - c)) - 1);
}

__m512 load(const BFloat16* p, __mmask16 mask) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

void store(BFloat16* p, __mmask16 mask, __m512 value) {
  _mm256_mask_storeu_epi16(p, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
}

struct Rows {
  Tensor map;  // keeps the memory
  const BFloat16* data;
  int64_t count, channels, stride;

  explicit Rows(const Tensor& given) : map(given) {
    const int64_t height = given.size(2), width = given.size(3);
    channels = given.size(1);
    count = given.size(0) * height * width;
    stride = given.stride(3);
    const bool regular = given.stride(1) == 1 && height > 1 && width > 1 && stride >= channels &&
                         given.stride(2) == width * stride && given.stride(0) == height * width * stride;
    if (!regular) {
      map = given.contiguous(at::MemoryFormat::ChannelsLast);
      stride = channels;
    }
    data = map.data_ptr<BFloat16>();
  }
  const BFloat16* row(int64_t r) const { return data + r * stride; }

  // How many rows to treat as one: of narrow rows that lie end to end, as many as fill whole vectors.
  int64_t fold() const {
    return stride == channels && channels % LANES && channels < 4 * LANES && count % LANES == 0 ? LANES : 1;
  }
  Rows folded(int64_t rows) const {
    Rows wide = *this;
    wide.count /= rows, wide.channels *= rows, wide.stride *= rows;
    return wide;
  }
};

std::vector<float> repeated(const std::vector<float>& values, int64_t times) {
  std::vector<float> all;
  for (int64_t i = 0; i < times; ++i) all.insert(all.end(), values.begin(), values.end());
  all.resize(all.size() + LANES);  // so that whole vectors can be read
  return all;
}

Tensor new_map(at::IntArrayRef sizes, const Tensor& like) {
  return at::empty(sizes, like.options().memory_format(at::MemoryFormat::ChannelsLast));
}

// Two sums over all rows for each channel, by `term(row, first channel, mask, sums)`, in double precision.
struct Sums {
  std::vector<double> first, second;
};

template <typename Term>
Sums sum_rows(const Rows& rows, int64_t fold, const Term& term) {
  const int64_t count = rows.count, channels = rows.channels;
  const int64_t threads = at::get_num_threads();
  std::vector<Sums> parts(threads, Sums{std::vector<double>(channels, 0.), std::vector<double>(channels, 0.)});
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t stop = count * (t + 1) / threads;
      for (int64_t r = count * t / threads; r < stop; r += CHUNK) {
        for (int64_t c = 0; c < channels; c += LANES) {
          const __mmask16 mask = lanes(c, channels);
          __m512 a[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, b[2] = {a[0], a[0]};
          term(r, std::min(r + CHUNK, stop), c, mask, a, b);
          alignas(64) float first[LANES], second[LANES];
          _mm512_store_ps(first, _mm512_add_ps(a[0], a[1]));
          _mm512_store_ps(second, _mm512_add_ps(b[0], b[1]));
          for (int64_t k = 0; k < std::min(LANES, channels - c); ++k) {
            parts[t].first[c + k] += first[k];
            parts[t].second[c + k] += second[k];
          }
        }
      }
    }
  });
  Sums total{std::vector<double>(channels / fold, 0.), std::vector<double>(channels / fold, 0.)};
  for (const Sums& part : parts) {
    for (int64_t c = 0; c < channels; ++c) {
      total.first[c % (channels / fold)] += part.first[c];
      total.second[c % (channels / fold)] += part.second[c];
    }
  }
  return total;
}

// y = max(0, scale * x + shift), the scale and shift of a BN, for folded rows.
struct Affine {
  std::vector<float> scale, shift;

  Affine(int64_t channels, int64_t fold, const float* weight, const float* bias, const float* mean,
         const float* inverse)
      : scale(channels), shift(channels) {
    for (int64_t c = 0; c < channels; ++c) {
      scale[c] = weight[c] * inverse[c];
      shift[c] = bias[c] - mean[c] * scale[c];
    }
    scale = repeated(scale, fold), shift = repeated(shift, fold);
  }
};

// The gradient where the ReLU let its input pass, 0 elsewhere.
__m512 pass(__m512 x, __m512 scale, __m512 shift, __m512 gradient) {
  const __mmask16 on = _mm512_cmp_ps_mask(_mm512_fmadd_ps(x, scale, shift), _mm512_setzero_ps(), _CMP_GT_OQ);
  return _mm512_maskz_mov_ps(on, gradient);
}

}  // namespace

// Maps of equal sizes side by side: torch.cat(maps, 1).
Tensor concatenate(const std::vector<Tensor>& maps) {
  const std::vector<Rows> parts(maps.begin(), maps.end());
  int64_t channels = 0;
  for (const Rows& part : parts) channels += part.channels;
  const Tensor map = new_map({maps[0].size(0), channels, maps[0].size(2), maps[0].size(3)}, maps[0]);
  BFloat16* out = map.data_ptr<BFloat16>();
  at::parallel_for(0, parts[0].count, 2048, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      BFloat16* to = out + r * channels;
      for (const Rows& part : parts) {
        for (int64_t c = 0; c < part.channels; c += LANES) {
          const __mmask16 mask = lanes(c, part.channels);
          _mm256_mask_storeu_epi16(to + c, mask, _mm256_maskz_loadu_epi16(mask, part.row(r) + c));
        }
        to += part.channels;
      }
    }
  });
  return map;
}

namespace {

// Folded rows of a map. A slice of many channels is read once only, to lay its few end to end.
Rows folded_rows(const Tensor& given, int64_t fold) {
  const Rows rows(given);
  return (fold == 1 || rows.stride == rows.channels ? rows : Rows(concatenate({given}))).folded(fold);
}

}  // namespace

// BN with the batch's own statistics, then ReLU; moves the running statistics. Returns y, mean, 1 / deviation.
std::vector<Tensor> norm_relu_forward(
    const Tensor& x, const Tensor& weight, const Tensor& bias, Tensor running_mean, Tensor running_var, double momentum,
    double eps) {
  const Rows rows(x);
  const int64_t n = rows.count, channels = rows.channels, fold = rows.fold();
  const Rows in = rows.folded(fold);
  TORCH_CHECK_VALUE(n > 1, "Expected more than 1 value per channel when training, got input size ", x.sizes());
  const Sums sums = sum_rows(in, fold, [&](int64_t r, int64_t stop, int64_t c, __mmask16 mask, __m512* a, __m512* b) {
    for (; r < stop; ++r) {
      const __m512 v = load(in.row(r) + c, mask);
      a[r & 1] = _mm512_add_ps(a[r & 1], v);
      b[r & 1] = _mm512_fmadd_ps(v, v, b[r & 1]);
    }
  });
  const Tensor mean = at::empty({channels}, at::kFloat), inverse = at::empty({channels}, at::kFloat);
  float *m = mean.data_ptr<float>(), *i = inverse.data_ptr<float>();
  float *rm = running_mean.data_ptr<float>(), *rv = running_var.data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    const double mu = sums.first[c] / n, var = std::max(sums.second[c] / n - mu * mu, 0.);
    m[c] = mu;
    i[c] = 1. / std::sqrt(var + eps);
    rm[c] = (1. - momentum) * rm[c] + momentum * mu;
    rv[c] = (1. - momentum) * rv[c] + momentum * var * n / (n - 1);
  }
  const Affine f(channels, fold, weight.data_ptr<float>(), bias.data_ptr<float>(), m, i);
  const Tensor y = new_map(x.sizes(), x);
  BFloat16* out = y.data_ptr<BFloat16>();
  at::parallel_for(0, in.count, 2048 / fold, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < in.channels; c += LANES) {
        const __mmask16 mask = lanes(c, in.channels);
        const __m512 v = _mm512_fmadd_ps(
            load(in.row(r) + c, mask), _mm512_loadu_ps(&f.scale[c]), _mm512_loadu_ps(&f.shift[c]));
        store(out + r * in.channels + c, mask, _mm512_max_ps(_mm512_setzero_ps(), v));
      }
    }
  });
  return {y, mean, inverse};
}

// Gradients of norm_relu_forward for x, weight and bias. `rest`, if given, is another gradient of x and is added. Which
// values the ReLU let pass is recomputed from x.
std::vector<Tensor> norm_relu_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
    const Tensor& inverse, const std::optional<Tensor>& rest) {
  const Rows rows(x);
  const int64_t n = rows.count, channels = rows.channels, fold = rows.fold();
  const Rows in = rows.folded(fold), grad = folded_rows(gradient, fold);
  const Rows other = rest ? folded_rows(*rest, fold) : grad;
  const float *m = mean.data_ptr<float>(), *i = inverse.data_ptr<float>();
  const Affine f(channels, fold, weight.data_ptr<float>(), bias.data_ptr<float>(), m, i);
  const Sums sums = sum_rows(in, fold, [&](int64_t r, int64_t stop, int64_t c, __mmask16 mask, __m512* a, __m512* b) {
    const __m512 scale = _mm512_loadu_ps(&f.scale[c]), shift = _mm512_loadu_ps(&f.shift[c]);
    for (; r < stop; ++r) {
      const __m512 v = load(in.row(r) + c, mask);
      const __m512 g = pass(v, scale, shift, load(grad.row(r) + c, mask));
      a[r & 1] = _mm512_add_ps(a[r & 1], g);
      b[r & 1] = _mm512_fmadd_ps(v, g, b[r & 1]);
    }
  });
  const Tensor grad_weight = at::empty({channels}, at::kFloat), grad_bias = at::empty({channels}, at::kFloat);
  // dx = scale * g - slope * x - offset
  std::vector<float> slope(channels), offset(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double along = (sums.second[c] - sums.first[c] * m[c]) * i[c];  // sum of g * normalised x
    grad_weight.data_ptr<float>()[c] = along;
    grad_bias.data_ptr<float>()[c] = sums.first[c];
    slope[c] = f.scale[c] * along / n * i[c];
    offset[c] = f.scale[c] * sums.first[c] / n - slope[c] * m[c];
  }
  slope = repeated(slope, fold), offset = repeated(offset, fold);
  const Tensor grad_x = new_map(x.sizes(), x);
  BFloat16* out = grad_x.data_ptr<BFloat16>();
  at::parallel_for(0, in.count, 2048 / fold, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < in.channels; c += LANES) {
        const __mmask16 mask = lanes(c, in.channels);
        const __m512 scale = _mm512_loadu_ps(&f.scale[c]), v = load(in.row(r) + c, mask);
        const __m512 g = pass(v, scale, _mm512_loadu_ps(&f.shift[c]), load(grad.row(r) + c, mask));
        __m512 sum = _mm512_fmsub_ps(scale, g, _mm512_loadu_ps(&offset[c]));
        sum = _mm512_fnmadd_ps(v, _mm512_loadu_ps(&slope[c]), sum);
        if (rest) sum = _mm512_add_ps(sum, load(other.row(r) + c, mask));
        store(out + r * in.channels + c, mask, sum);
      }
    }
  });
  return {grad_x, grad_weight, grad_bias};
}

// The nine values under each position of a 3x3 kernel with padding 1 and stride 1 or 2: (N * H' * W', 9 * C).
template <int64_t STRIDE>
Tensor gather(const Tensor& x) {
  const Rows in(x);
  const int64_t n = x.size(0), channels = in.channels, height = x.size(2), width = x.size(3);
  const int64_t out_height = (height + STRIDE - 1) / STRIDE, out_width = (width + STRIDE - 1) / STRIDE;
  const Tensor columns = at::empty(
      {n * out_height * out_width, 9 * channels}, x.options().memory_format(at::MemoryFormat::Contiguous));
  BFloat16* out = columns.data_ptr<BFloat16>();
  at::parallel_for(0, n * out_height, 8, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t image = line / out_height * height, top = line % out_height * STRIDE - 1;
      for (int64_t j = 0; j < out_width; ++j) {
        BFloat16* to = out + (line * out_width + j) * 9 * channels;
        for (int64_t k = 0; k < 9; ++k, to += channels) {
          const int64_t h = top + k / 3, w = STRIDE * j + k % 3 - 1;
          if (h < 0 || w < 0 || h >= height || w >= width) {
            std::memset(to, 0, channels * sizeof(BFloat16));
          } else {
            std::memcpy(to, in.row((image + h) * width + w), channels * sizeof(BFloat16));
          }
        }
      }
    }
  });
  return columns;
}

// The transpose of gather: each pixel's values from all places that they were gathered to, added up.
template <int64_t STRIDE>
Tensor scatter(const Tensor& columns, int64_t n, int64_t channels, int64_t height, int64_t width) {
  const int64_t out_height = (height + STRIDE - 1) / STRIDE, out_width = (width + STRIDE - 1) / STRIDE;
  const Tensor map = new_map({n, channels, height, width}, columns);
  const BFloat16* from = columns.data_ptr<BFloat16>();
  BFloat16* out = map.data_ptr<BFloat16>();
  at::parallel_for(0, n * height, 8, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t image = line / height * out_height;
      for (int64_t w = 0; w < width; ++w) {
        const BFloat16* places[9];
        int64_t found = 0;
        for (int64_t k = 0; k < 9; ++k) {
          const int64_t i = line % height + 1 - k / 3, j = w + 1 - k % 3;
          if (i >= 0 && j >= 0 && i % STRIDE == 0 && j % STRIDE == 0 && i / STRIDE < out_height &&
              j / STRIDE < out_width) {
            places[found++] = from + (((image + i / STRIDE) * out_width + j / STRIDE) * 9 + k) * channels;
          }
        }
        for (int64_t c = 0; c < channels; c += LANES) {
          const __mmask16 mask = lanes(c, channels);
          __m512 sum = load(places[0] + c, mask);
          for (int64_t p = 1; p < found; ++p) sum = _mm512_add_ps(sum, load(places[p] + c, mask));
          store(out + (line * width + w) * channels + c, mask, sum);
        }
      }
    }
  });
  return map;
}

// Where a bilinear resize with aligned corners reads: the first of two neighbours, and the weight of the second.
struct Taps {
  std::vector<int64_t> first;
  std::vector<float> weight;

  Taps(int64_t from, int64_t to) : first(to), weight(to) {
    for (int64_t i = 0; i < to; ++i) {
      const double at = to > 1 ? static_cast<double>(i) * (from - 1) / (to - 1) : 0.;
      first[i] = std::min<int64_t>(at, std::max<int64_t>(from - 2, 0));
      weight[i] = at - first[i];
    }
  }
};

// Weights of the four neighbours: above left, above right, below left, below right.
struct Corners {
  __m512 at[4];

  Corners(float below, float right) {
    for (int64_t k = 0; k < 4; ++k) {
      at[k] = _mm512_set1_ps((k / 2 ? below : 1 - below) * (k % 2 ? right : 1 - right));
    }
  }
};

// x (N, C, H, W) resized bilinearly, corners aligned.
Tensor resize_forward(const Tensor& x, int64_t out_height, int64_t out_width) {
  const Rows in(x);
  const int64_t n = x.size(0), channels = in.channels, height = x.size(2), width = x.size(3);
  const Taps down(height, out_height), across(width, out_width);
  const int64_t right = width > 1, below = height > 1 ? width : 0;
  const Tensor map = new_map({n, channels, out_height, out_width}, x);
  BFloat16* out = map.data_ptr<BFloat16>();
  at::parallel_for(0, n * out_height, 8, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t i = line % out_height, row = (line / out_height * height + down.first[i]) * width;
      for (int64_t j = 0; j < out_width; ++j) {
        const int64_t at = row + across.first[j];
        const Corners weights(down.weight[i], across.weight[j]);
        for (int64_t c = 0; c < channels; c += LANES) {
          const __mmask16 mask = lanes(c, channels);
          __m512 sum = _mm512_mul_ps(weights.at[0], load(in.row(at) + c, mask));
          sum = _mm512_fmadd_ps(weights.at[1], load(in.row(at + right) + c, mask), sum);
          sum = _mm512_fmadd_ps(weights.at[2], load(in.row(at + below) + c, mask), sum);
          sum = _mm512_fmadd_ps(weights.at[3], load(in.row(at + below + right) + c, mask), sum);
          store(out + (line * out_width + j) * channels + c, mask, sum);
        }
      }
    }
  });
  return map;
}

// The transpose of resize_forward.
Tensor resize_backward(const Tensor& gradient, int64_t height, int64_t width) {
  const Rows grad(gradient);
  const int64_t n = gradient.size(0), channels = grad.channels;
  const int64_t out_height = gradient.size(2), out_width = gradient.size(3);
  const Taps down(height, out_height), across(width, out_width);
  const int64_t padded = (channels + LANES - 1) / LANES * LANES;
  const int64_t right = width > 1 ? padded : 0, below = height > 1 ? width * padded : 0;
  const Tensor map = new_map({n, channels, height, width}, gradient);
  BFloat16* out = map.data_ptr<BFloat16>();
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(height * width * padded);
    for (int64_t image = begin; image < end; ++image) {
      std::fill(sums.begin(), sums.end(), 0.f);
      for (int64_t i = 0; i < out_height; ++i) {
        for (int64_t j = 0; j < out_width; ++j) {
          const BFloat16* from = grad.row((image * out_height + i) * out_width + j);
          float* to = &sums[(down.first[i] * width + across.first[j]) * padded];
          const Corners weights(down.weight[i], across.weight[j]);
          for (int64_t c = 0; c < channels; c += LANES, to += LANES) {
            const __m512 g = load(from + c, lanes(c, channels));
            for (int64_t k = 0; k < 4; ++k) {
              float* sum = to + k / 2 * below + k % 2 * right;
              _mm512_storeu_ps(sum, _mm512_fmadd_ps(weights.at[k], g, _mm512_loadu_ps(sum)));
            }
          }
        }
      }
      for (int64_t pixel = 0; pixel < height * width; ++pixel) {
        for (int64_t c = 0; c < channels; c += LANES) {
          store(out + (image * height * width + pixel) * channels + c, lanes(c, channels),
                _mm512_loadu_ps(&sums[pixel * padded + c]));
        }
      }
    }
  });
  return map;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("concatenate", &concatenate);
  module.def("norm_relu_forward", &norm_relu_forward);
  module.def("norm_relu_backward", &norm_relu_backward);
  module.def("gather", &gather<1>);
  module.def("scatter", &scatter<1>);
  module.def("gather_strided", &gather<2>);
  module.def("scatter_strided", &scatter<2>);
  module.def("resize_forward", &resize_forward);
  module.def("resize_backward", &resize_backward);
}
