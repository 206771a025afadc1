#include "kernels/isa_avx512.h"
#include "kernels/product.h"

namespace owl {

extern const Kernels kAvx512Kernels;
constexpr Kernels kAvx512Kernels = kernels_of<Avx512>(Formats{});

}  // namespace owl
