#include "quant/gram.h"

#include <algorithm>

#include "quant/product.h"

namespace gptq {

void add_gram(at::Tensor& gram, const at::Tensor& rows) {
  constexpr int64_t block = 512;  // wide enough for the product to run at full speed
  const int64_t k = gram.size(0);
  const at::Tensor columns = rows.t().contiguous();
  for (int64_t first = 0; first < k; first += block) {
    const int64_t width = std::min(block, k - first);
    gram.narrow(0, first, width)
        .narrow(1, first, k - first)
        .add_(product(columns.narrow(0, first, width), columns.narrow(0, first, k - first)));
  }
}

at::Tensor mirrored(const at::Tensor& gram, double scale) {
  at::Tensor full = gram.triu().mul_(scale);
  return full.add_(full.triu(1).t());
}

}  // namespace gptq
