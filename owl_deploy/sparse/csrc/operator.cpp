// owl::SparseMatMul for ONNX Runtime: Y [..., outputs] = X [..., columns] times the packed matrix W, whose bytes are a
// constant initializer. Everything else about the product is in W's header.
#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "buffer.h"
#include "format/format.h"
#include "kernels/kernels.h"
#include "library.h"
#include "onnxruntime_api.h"

namespace owl {
namespace {

constexpr const char* kKernelsVariable = "OWL_DEPLOY_KERNELS";
constexpr std::size_t kMaxRank = 16;

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
OrtStatus* fail(const OrtApi* api, ort::ErrorCode code, const char* format, ...) {
  char message[1024] = "owl::SparseMatMul: ";
  const std::size_t prefix = std::strlen(message);
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message + prefix, sizeof message - prefix, format, arguments);
  va_end(arguments);
  return ort::create_status(api, code, message);
}

// ONNX Runtime must see statuses only: whatever `body` throws becomes one.
template <class Body>
OrtStatus* guarded(const OrtApi* api, const Body& body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return fail(api, ort::kFail, "not enough memory");
  } catch (const std::exception& error) {
    return fail(api, ort::kFail, "%s", error.what());
  } catch (...) {
    return fail(api, ort::kFail, "unknown error");
  }
}

struct Tensor {
  void* data;
  ort::ElementType type;
  std::size_t rank;
  std::int64_t dimensions[kMaxRank];

  std::size_t elements() const {
    std::size_t count = 1;
    for (std::size_t i = 0; i < rank; ++i) count *= static_cast<std::size_t>(dimensions[i]);
    return count;
  }
};

OrtStatus* read_tensor(const OrtApi* api, const OrtValue* value, Tensor& tensor) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatus* status = ort::get_tensor_type_and_shape(api, value, &info)) return status;
  OrtStatus* status = ort::get_tensor_element_type(api, info, &tensor.type);
  if (!status) status = ort::get_dimensions_count(api, info, &tensor.rank);
  if (!status && tensor.rank > kMaxRank) {
    status = fail(api, ort::kInvalidArgument, "an input of %zu dimensions, more than %zu", tensor.rank, kMaxRank);
  }
  if (!status) status = ort::get_dimensions(api, info, tensor.dimensions, tensor.rank);
  ort::release_tensor_type_and_shape_info(api, info);
  // This version of the API has no function for data that is only read.
  if (!status) status = ort::get_tensor_mutable_data(api, const_cast<OrtValue*>(value), &tensor.data);
  return status;
}

// One node of a session. Any number of threads may be in `compute` at once: nothing here changes after `create`.
class SparseMatMul {
 public:
  explicit SparseMatMul(const OrtApi* api) : api_(api) {}

  OrtStatus* create(const OrtKernelInfo* info) {
    // What fails here fails without ONNX Runtime adding which node it was.
    std::size_t name_size = 0;
    if (OrtStatus* status = ort::kernel_info_node_name(api_, info, nullptr, &name_size)) return status;
    std::string name(name_size, '\0');
    if (OrtStatus* status = ort::kernel_info_node_name(api_, info, name.data(), &name_size)) return status;
    const char* node = name.c_str();

    int constant = 0;
    const OrtValue* value = nullptr;
    if (OrtStatus* status = ort::kernel_info_constant_input(api_, info, 1, &constant, &value)) return status;
    if (!constant || value == nullptr) {
      return fail(api_, ort::kInvalidArgument, "W is not a constant initializer (node \"%s\")", node);
    }
    Tensor w;
    if (OrtStatus* status = read_tensor(api_, value, w)) return status;
    if (w.type != ort::kUint8 || w.rank != 1) {
      return fail(api_, ort::kInvalidArgument, "W is not a vector of uint8 (node \"%s\")", node);
    }

    // The bytes are used where they are, the session's for as long as it runs kernels. As external data they are a
    // mapping of the model's file, and cost no memory of our own. Only where they are not aligned there is a copy:
    // initializers inside the model, or a file written with no care for it.
    const auto* data = static_cast<const std::uint8_t*>(w.data);
    const std::size_t size = w.elements();
    if (reinterpret_cast<std::uintptr_t>(data) % kAlignment != 0) {
      data = reinterpret_cast<const std::uint8_t*>(std::memcpy(copy_.reserve(size), data, size));
    }
    if (const char* problem = parse(data, size, weights_)) {
      return fail(api_, ort::kInvalidArgument, "W: %s (node \"%s\")", problem, node);
    }

    const char* kernels = std::getenv(kKernelsVariable);
    kernels_ = find_kernels(kernels);
    if (kernels_ == nullptr) {
      return fail(api_, ort::kInvalidArgument, "%s is \"%s\", which are no kernels that this CPU can run (it can: %s)",
                  kKernelsVariable, kernels == nullptr ? "" : kernels, owl_instruction_sets());
    }
    return nullptr;
  }

  OrtStatus* compute(OrtKernelContext* context) const noexcept {
    return guarded(api_, [&] { return multiply(context); });
  }

 private:
  OrtStatus* multiply(OrtKernelContext* context) const {
    const OrtValue* input = nullptr;
    if (OrtStatus* status = ort::kernel_context_input(api_, context, 0, &input)) return status;
    Tensor x;
    if (OrtStatus* status = read_tensor(api_, input, x)) return status;
    if (x.type != ort::kFloat || x.rank == 0) {
      return fail(api_, ort::kInvalidArgument, "X is not a float tensor of at least one dimension");
    }
    std::int64_t& last = x.dimensions[x.rank - 1];
    const std::int64_t columns = weights_.header.columns;
    if (last != columns) {
      return fail(api_, ort::kInvalidArgument, "X's last dimension is %lld, but W has %lld columns",
                  static_cast<long long>(last), static_cast<long long>(columns));
    }
    const std::int64_t tokens = static_cast<std::int64_t>(x.elements()) / columns;

    last = outputs(weights_.header);
    OrtValue* output = nullptr;
    if (OrtStatus* status = ort::kernel_context_output(api_, context, 0, x.dimensions, x.rank, &output)) return status;
    if (tokens == 0) return nullptr;
    void* y = nullptr;
    if (OrtStatus* status = ort::get_tensor_mutable_data(api_, output, &y)) return status;

    const Way& way = kernels_->way(weights_.header.format, tokens);
    // A thread is in one product at a time, whoever helps it with the items, so one scratch for each will do.
    thread_local Buffer scratch;
    const Product product{&weights_, static_cast<const float*>(x.data), static_cast<float*>(y), tokens,
                          scratch.reserve(way.scratch_bytes(weights_.header, tokens))};
    const int stages = way.stages(weights_.header, tokens);
    for (int stage = 0; stage < stages; ++stage) {
      if (OrtStatus* status = run(context, way, product, stage)) return status;
    }
    return nullptr;
  }

  struct Work {
    const Way* way;
    const Product* product;
    int stage;
    std::atomic<bool> failed{false};
  };

  // On any of the session's threads, for which ONNX Runtime takes no status.
  static void run_item(void* user, std::size_t item) noexcept {
    Work& work = *static_cast<Work*>(user);
    std::byte* space = nullptr;
    if (work.way->workspace_bytes != 0) {
      try {
        thread_local Buffer workspace;
        space = workspace.reserve(work.way->workspace_bytes);
      } catch (const std::bad_alloc&) {
        work.failed.store(true, std::memory_order_relaxed);
        return;
      }
    }
    work.way->run(*work.product, work.stage, static_cast<std::int64_t>(item), space);
  }

  OrtStatus* run(OrtKernelContext* context, const Way& way, const Product& product, int stage) const {
    Work work{&way, &product, stage};
    const std::int64_t items = way.items(weights_.header, product.tokens, stage);
    if (items == 1) run_item(&work, 0);
    if (items > 1) {
      // 0 batches: a thread starts on a contiguous share of the items, the same in every call, takes them one by one,
      // and then helps with the shares of others, so that a thread the system does not run in time delays one item at
      // most. With a number of batches these are what is taken: 20 ns an item cheaper, and coarser.
      OrtStatus* status =
          ort::kernel_context_parallel_for(api_, context, &run_item, static_cast<std::size_t>(items), 0, &work);
      if (status != nullptr) return status;
    }
    if (work.failed) throw std::bad_alloc();
    return nullptr;
  }

  const OrtApi* api_;
  const Kernels* kernels_ = nullptr;
  Packed weights_{};
  Buffer copy_;
};

OrtStatus* OWL_ORT_CALL create_kernel(const ort::CustomOp*, const OrtApi* api, const OrtKernelInfo* info,
                                      void** kernel) {
  return guarded(api, [&]() -> OrtStatus* {
    auto created = std::make_unique<SparseMatMul>(api);
    if (OrtStatus* status = created->create(info)) return status;
    *kernel = created.release();
    return nullptr;
  });
}

void OWL_ORT_CALL destroy_kernel(void* kernel) { delete static_cast<SparseMatMul*>(kernel); }

OrtStatus* OWL_ORT_CALL compute(void* kernel, OrtKernelContext* context) {
  return static_cast<const SparseMatMul*>(kernel)->compute(context);
}

const char* OWL_ORT_CALL name(const ort::CustomOp*) { return "SparseMatMul"; }
const char* OWL_ORT_CALL execution_provider(const ort::CustomOp*) { return nullptr; }  // the CPU's
std::size_t OWL_ORT_CALL input_count(const ort::CustomOp*) { return 2; }
std::size_t OWL_ORT_CALL output_count(const ort::CustomOp*) { return 1; }
ort::ElementType OWL_ORT_CALL input_type(const ort::CustomOp*, std::size_t index) {
  return index == 0 ? ort::kFloat : ort::kUint8;
}
ort::ElementType OWL_ORT_CALL output_type(const ort::CustomOp*, std::size_t) { return ort::kFloat; }
ort::Characteristic OWL_ORT_CALL characteristic(const ort::CustomOp*, std::size_t) { return ort::kRequired; }
ort::MemoryType OWL_ORT_CALL memory_type(const ort::CustomOp*, std::size_t) { return ort::kDefaultMemory; }
int OWL_ORT_CALL min_arity(const ort::CustomOp*) { return 1; }
int OWL_ORT_CALL homogeneity(const ort::CustomOp*) { return 1; }
int OWL_ORT_CALL start_version(const ort::CustomOp*) { return 1; }

constexpr ort::CustomOp kOperator = {
    .version = ort::kApiVersion,
    .create_kernel = nullptr,  // the second versions are there to return a status
    .name = name,
    .execution_provider = execution_provider,
    .input_type = input_type,
    .input_count = input_count,
    .output_type = output_type,
    .output_count = output_count,
    .compute = nullptr,
    .destroy_kernel = destroy_kernel,
    .input_characteristic = characteristic,
    .output_characteristic = characteristic,
    .input_memory_type = memory_type,
    .variadic_input_min_arity = min_arity,
    .variadic_input_homogeneity = homogeneity,
    .variadic_output_min_arity = min_arity,
    .variadic_output_homogeneity = homogeneity,
    .create_kernel_v2 = create_kernel,
    .compute_v2 = compute,
    // The number of outputs is in W's bytes, which this callback cannot see: the model's value_info says the shape.
    .infer_output_shape = nullptr,
    .start_version = start_version,
    .end_version = nullptr,  // none
};

// The domain for one runtime: a process may have several, each with types of its own.
OrtStatus* domain_for(const OrtApi* api, OrtCustomOpDomain*& domain) {
  static std::mutex mutex;
  // Never released: sessions that use a domain may live longer than anything of ours, this vector included.
  static auto& domains = *new std::vector<std::pair<const OrtApi*, OrtCustomOpDomain*>>;
  const std::lock_guard lock(mutex);
  for (const auto& [known, its_domain] : domains) {
    if (known == api) {
      domain = its_domain;
      return nullptr;
    }
  }
  domains.reserve(domains.size() + 1);
  if (OrtStatus* status = ort::create_custom_op_domain(api, "owl", &domain)) return status;
  if (OrtStatus* status = ort::custom_op_domain_add(api, domain, &kOperator)) {
    ort::release_custom_op_domain(api, domain);
    return status;
  }
  domains.emplace_back(api, domain);
  return nullptr;
}

OrtStatus* too_old(const OrtApiBase* base) {
  char message[256];
  std::snprintf(message, sizeof message, "onnxruntime %s is running, and 1.%u or newer is needed",
                base->GetVersionString(), static_cast<unsigned>(ort::kApiVersion));
  // The table only grows, so the first version of it has what makes a status.
  if (const OrtApi* api = base->GetApi(1)) return fail(api, ort::kFail, "%s", message);
  std::fprintf(stderr, "owl::SparseMatMul: %s\n", message);
  return nullptr;  // without the operator the model fails to load
}

}  // namespace
}  // namespace owl

OWL_EXPORT OrtStatus* OWL_ORT_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(owl::ort::kApiVersion);
  if (api == nullptr) return owl::too_old(base);
  return owl::guarded(api, [&]() -> OrtStatus* {
    // Sessions refuse options that have the same domain twice, and only these say that they have it.
    int registered = 0;
    if (OrtStatus* status = owl::ort::has_session_config_entry(api, options, "owl.registered", &registered)) {
      return status;
    }
    if (registered) return nullptr;
    OrtCustomOpDomain* domain = nullptr;
    if (OrtStatus* status = owl::domain_for(api, domain)) return status;
    if (OrtStatus* status = owl::ort::add_custom_op_domain(api, options, domain)) return status;
    return owl::ort::add_session_config_entry(api, options, "owl.registered", "1");
  });
}
