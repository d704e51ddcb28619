// A pretended GPU: tensors lie in the host's memory and are computed by the CPU's kernels, under the rules of CUDA.
//
// There are two such devices. Tensors of different devices may not meet; reading a value waits for the device, and is
// counted with the line of Python that does it; memory can be limited; a graph records what is launched and runs it
// again on the same memory. It is registered as torch's backend PrivateUse1, so that autograd, factories and copies treat
// it as they treat a GPU. ``device.py`` builds it and gives it the interface of ``torch.cuda``.

// the header of every operator by itself: that of all of them takes seconds to compile
#define AT_PER_OPERATOR_HEADERS
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/TensorUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

using at::Tensor;
using torch::jit::Stack;

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
constexpr int DEVICES = 2;

thread_local c10::DeviceIndex current = 0;

// ---------------------------------------------------------------------------------------------------- what is counted

using FindPlace = void (*)(char* text, int size);

std::mutex guard;
FindPlace find_place = nullptr;
bool place_launches = false;  // to look at Python's stack takes microseconds, so launches have a place on demand
std::map<std::string, std::map<std::string, int64_t>> counts;  // kind -> "what \t place" -> how often

void count(const std::string& kind, const std::string& what, bool placed) {
  char place[512] = "";
  if (placed && find_place) find_place(place, sizeof(place));
  std::lock_guard<std::mutex> hold(guard);
  counts[kind][placed ? what + "\t" + place : what]++;
}

[[noreturn]] void fault(const std::string& what) {
  count("fault", what, true);
  TORCH_CHECK(false, what);
}

// ------------------------------------------------------------------------------------------------------------ graphs

struct Graph {
  std::vector<std::function<void()>> steps;
  std::vector<Tensor> results;  // host views of what the steps made
};

std::map<int64_t, std::unique_ptr<Graph>> graphs;
Graph* recording = nullptr;
c10::DeviceIndex recorded_device = 0;
std::set<const void*> made;  // memory that was taken while recording
std::atomic<bool> refuse_waits{false};

bool records(c10::Device device) { return recording && device.index() == recorded_device; }

void launch(const std::string& what) { count("launch", what, place_launches); }

void wait(const std::string& what, c10::Device device) {
  TORCH_CHECK(!records(device), "operation not permitted when stream is capturing: ", what);
  TORCH_CHECK(!refuse_waits, "called a synchronizing operation: ", what);
  count("wait", what, true);
}

// ------------------------------------------------------------------------------------------------------------ memory

std::atomic<int64_t> held[DEVICES], peak[DEVICES], limit[DEVICES];

void take(c10::DeviceIndex device, int64_t bytes) {
  auto now = held[device] += bytes;
  if (limit[device] && now > limit[device]) {
    held[device] -= bytes;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "pretended device out of memory. Tried to allocate ", bytes, " bytes beside ",
                     now - bytes, " of ", limit[device].load());
  }
  auto most = peak[device].load();
  while (now > most && !peak[device].compare_exchange_weak(most, now)) {
  }
}

struct Block {
  void* memory;
  c10::DeviceIndex device;
  int64_t bytes;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  held[block->device] -= block->bytes;
  std::free(block->memory);
  delete block;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    take(current, bytes);
    void* memory = nullptr;
    if (bytes) TORCH_CHECK(posix_memalign(&memory, 64, bytes) == 0, "the host is out of memory");
    if (recording) made.insert(memory);
    return {memory, new Block{memory, current, (int64_t)bytes}, &free_block, c10::Device(TYPE, current)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Allocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &allocator);

c10::Device indexed(c10::Device device) { return {TYPE, device.has_index() ? device.index() : current}; }

struct OnDevice {  // the current device, for a scope
  c10::DeviceIndex before = current;
  explicit OnDevice(c10::Device device) { current = indexed(device).index(); }
  ~OnDevice() { current = before; }
};

// -------------------------------------------------------------------------------------- what torch asks of a backend

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = current;
    current = device.index();
    return {TYPE, before};
  }
  c10::Device getDevice() const override { return {TYPE, current}; }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, indexed(device)); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current = device; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    std::swap(current, device);
    return device;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    fault("the device's own generator was asked for");
  }
};

// -------------------------------------------------------------------------- the same memory as a tensor of the other

Tensor view_of(const c10::Storage& storage, c10::DispatchKey key, const Tensor& like) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) view._set_conj(true);
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) view.unsafeGetTensorImpl()->set_wrapped_number(true);
  return view;
}

struct Kept {  // a storage that a view of the other kind keeps alive
  c10::Storage storage;
  c10::DeviceIndex device;
  int64_t bytes;
};

void release(void* context) {
  auto* kept = static_cast<Kept*>(context);
  if (kept->bytes) held[kept->device] -= kept->bytes;
  delete kept;
}

Tensor to_host(const Tensor& t) {
  const auto& storage = t.storage();
  c10::DataPtr data(storage.unsafeGetStorageImpl()->mutable_data_ptr().get(), new Kept{storage, 0, 0}, &release,
                    c10::Device(c10::kCPU));
  c10::Storage own(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), nullptr, false);
  return view_of(own, c10::DispatchKey::CPU, t);
}

Tensor to_device(const Tensor& t, c10::Device device) {
  const auto& storage = t.storage();
  auto bytes = (int64_t)storage.nbytes();
  auto index = indexed(device).index();
  take(index, bytes);
  auto* memory = storage.unsafeGetStorageImpl()->mutable_data_ptr().get();
  if (recording) made.insert(memory);
  c10::DataPtr data(memory, new Kept{storage, index, bytes}, &release, c10::Device(TYPE, index));
  c10::Storage own(c10::Storage::use_byte_size_t(), bytes, std::move(data), &allocator, true);
  return view_of(own, c10::DispatchKey::PrivateUse1, t);
}

bool on_device(const Tensor& t) { return t.defined() && t.device().type() == TYPE; }

// ------------------------------------------------------------------------------------------------- the rules of CUDA

// Operators that wait for the device and whose tags do not say so.
const std::set<std::string> WAITS = {"aten::_linalg_eigh", "aten::_linalg_svd",           "aten::linalg_lstsq",
                                     "aten::bincount",     "aten::_linalg_check_errors", "aten::is_set_to",
                                     "aten::multinomial"};
const std::set<std::string> INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
                                        "aten::_unsafe_index", "aten::_unsafe_index_put"};
// Operators in which a scalar tensor of the CPU may not meet the device, as it may in pointwise ones.
const std::set<std::string> STRICT = {"aten::cat",    "aten::bmm",     "aten::mm",           "aten::addmm", "aten::baddbmm",
                                      "aten::gather", "aten::scatter", "aten::index_select", "aten::stack", "aten::dot",
                                      "aten::mv"};

bool is_mask(const Tensor& t) { return t.scalar_type() == at::kBool || t.scalar_type() == at::kByte; }

std::string mixed(const std::string& one, const std::string& other, const std::string& name) {
  return "Expected all tensors to be on the same device, but found at least two devices, " + one + " and " + other + "! (" +
         name + ")";
}

// Calls f with every tensor among the arguments.
template <class F>
void each_tensor(const Stack& arguments, const F& f) {
  for (const auto& value : arguments) {
    if (value.isTensor()) {
      f(value.toTensor());
    } else if (value.isTensorList()) {
      for (const Tensor& t : value.toTensorVector()) f(t);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<Tensor>& t : value.toOptionalTensorVector()) f(t.value_or(Tensor()));
    }
  }
}

void check_indexing(const std::string& base, const Stack& arguments, c10::Device device) {
  bool put = base.find("put") != std::string::npos;
  bool fills = put && arguments[2].toTensor().numel() == 1;  // is done as masked_fill
  for (const std::optional<Tensor>& index : arguments[1].toOptionalTensorVector()) {
    if (!index || !index->defined() || index->dim() == 0) continue;
    if (!on_device(*index)) wait(base + " by an index of the CPU", device);
    else if (is_mask(*index) && !fills) wait(base + " by a mask", device);
  }
}

// Returns the device of an operator's tensors; raises where CUDA would.
c10::Device check(const c10::OperatorHandle& op, const Stack& arguments) {
  const auto& base = op.schema().name();
  std::optional<c10::Device> found;
  for (const auto& value : arguments)
    if (value.isGenerator() && value.toGenerator().defined() && value.toGenerator().device().type() == c10::kCPU)
      fault("Expected a 'cuda' device type for generator but found 'cpu' (" + base + ")");
  each_tensor(arguments, [&](const Tensor& t) {
    if (!on_device(t)) return;
    if (found && *found != t.device()) fault(mixed(found->str(), t.device().str(), base));
    found = t.device();
  });
  auto device = found.value_or(c10::Device(TYPE, current));
  bool first = true, indexes = INDEXING.count(base) > 0;
  each_tensor(arguments, [&](const Tensor& t) {
    bool self = first;
    first = false;
    if (!found || !t.defined() || on_device(t)) return;
    if (t.dim() == 0 && !STRICT.count(base)) {
      if (!t.unsafeGetTensorImpl()->is_wrapped_number()) count("remark", "a scalar tensor of the CPU in " + base, true);
    } else if (!indexes || self || t.is_floating_point()) {
      fault(mixed(device.str(), t.device().str(), base));
    }
  });
  if (indexes) check_indexing(base, arguments, device);
  else if (WAITS.count(base) || op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape))
    wait(base, device);
  return device;
}

// ------------------------------------------------------------------------------------------------------------- draws

// Each device draws from a state of its own. A state that nothing has seeded is empty.
Tensor states[DEVICES];

struct OwnDraws {
  bool draws;
  c10::DeviceIndex device;
  Tensor before;
  OwnDraws(const c10::OperatorHandle& op, c10::Device at) : draws(op.hasTag(at::Tag::nondeterministic_seeded)), device(at.index()) {
    if (!draws) return;
    if (!states[device].defined() || !states[device].numel()) count("remark", "unseeded draws of " + op.schema().name(), true);
    auto& generator = at::detail::getDefaultCPUGenerator();
    before = generator.get_state();
    if (states[device].defined() && states[device].numel()) const_cast<at::Generator&>(generator).set_state(states[device]);
  }
  ~OwnDraws() {
    if (!draws) return;
    auto& generator = const_cast<at::Generator&>(at::detail::getDefaultCPUGenerator());
    if (states[device].defined() && states[device].numel()) states[device] = generator.get_state();
    generator.set_state(before);
  }
};

// --------------------------------------------------------------------------------- every operator without a kernel here

using Pairs = std::vector<std::pair<Tensor, Tensor>>;  // a tensor of the device and its view on the host

template <class F>
c10::IValue mapped(const c10::IValue& value, const F& f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& t : value.toTensorVector()) list.push_back(f(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& t : value.toOptionalTensorVector()) list.push_back(t ? std::optional<Tensor>(f(*t)) : t);
    return list;
  }
  if (value.isDevice() && value.toDevice().type() == TYPE) return c10::Device(c10::kCPU);
  return value;
}

void run_on_host(const c10::OperatorHandle& op, Stack* stack, c10::Device device) {
  at::AutoDispatchBelowADInplaceOrView below;
  OwnDraws own(op, device);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const auto& schema = op.schema();
  auto inputs = schema.arguments().size();
  Stack arguments(stack->end() - inputs, stack->end());
  stack->resize(stack->size() - inputs);
  auto device = check(op, arguments);
  for (const auto& value : arguments)
    if (value.isDevice() && value.toDevice().type() == TYPE) device = indexed(value.toDevice());
  launch(schema.name());

  bool record = records(device);
  Pairs pairs;
  auto host = [&](const Tensor& t, bool writes) -> Tensor {
    if (!on_device(t)) return t;
    for (auto& [own, other] : pairs)
      if (own.is_same(t)) return other;
    auto grows = writes && t.numel() == 0;
    auto other = grows ? at::empty(t.sizes(), at::TensorOptions().dtype(t.dtype())) : to_host(t);
    pairs.emplace_back(t, other);
    return other;
  };
  Stack hosted;
  for (size_t i = 0; i < inputs; i++) {
    auto* alias = schema.arguments()[i].alias_info();
    bool writes = alias && alias->isWrite();
    hosted.push_back(mapped(arguments[i], [&](const Tensor& t) { return host(t, writes); }));
  }
  // A recording runs nothing: memory from before it keeps its values, so writes go to a copy.
  Stack results = hosted;
  Pairs copies;
  if (record)
    for (size_t i = 0; i < inputs; i++) {
      auto* alias = schema.arguments()[i].alias_info();
      if (!alias || !alias->isWrite()) continue;
      results[i] = mapped(hosted[i], [&](const Tensor& t) -> Tensor {
        if (!t.defined() || !t.numel()) return t;
        if (made.count(t.storage().data())) {
          recording->results.push_back(t);
          return t;
        }
        copies.emplace_back(t, t.clone());
        return copies.back().second;
      });
    }
  run_on_host(op, &results, device);

  for (auto& [own, other] : pairs)  // an output that was empty has grown
    if (own.numel() == 0 && other.numel() != 0) {
      auto whole = to_device(other, own.device());
      own.unsafeGetTensorImpl()->set_storage_keep_dtype(whole.storage());
      own.unsafeGetTensorImpl()->set_sizes_and_strides(other.sizes(), other.strides(), other.storage_offset());
    }
  std::vector<Tensor> fresh;  // by output; undefined where it is one of the inputs or a view of one
  auto back = [&](const Tensor& t) -> Tensor {
    fresh.emplace_back();
    if (!t.defined() || t.device().type() != c10::kCPU) return t;
    for (auto& [other, copy] : copies)
      if (copy.is_same(t))
        for (auto& [own, host] : pairs)
          if (host.is_same(other)) return own;
    for (auto& [own, other] : pairs)
      if (other.is_same(t)) return own;
    for (auto& [own, other] : pairs)
      if (other.has_storage() && t.storage().data() == other.storage().data() && t.numel())
        return view_of(own.storage(), c10::DispatchKey::PrivateUse1, t);
    fresh.back() = t;
    return to_device(t, device);
  };
  for (const auto& value : results) stack->push_back(mapped(value, back));
  if (!record) return;
  for (auto& t : fresh)
    if (t.defined()) recording->results.push_back(t);
  recording->steps.emplace_back([op, hosted, fresh, device] {
    Stack again = hosted;
    run_on_host(op, &again, device);
    size_t at = 0;
    each_tensor(again, [&](const Tensor& t) {
      if (fresh[at].defined()) fresh[at].copy_(t);
      at++;
    });
  });
}

// ------------------------------------------------------------------------------------ operators with a kernel of their own

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  OnDevice scope(device.value_or(c10::Device(TYPE)));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  OnDevice scope(device.value_or(c10::Device(TYPE)));
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  bool here = on_device(from), there = on_device(to);
  auto device = there ? to.device() : from.device();
  auto name = !there ? "copy to the host" : !here ? "copy to the device" : from.device() == to.device() ? "copy" : "copy between devices";
  launch(name);
  if (!here || !there) wait(name, device);  // the host's memory is pageable
  at::AutoDispatchBelowADInplaceOrView below;
  auto source = here ? to_host(from) : from;
  auto target = there ? to_host(to) : to;
  if (records(device)) recording->steps.emplace_back([source, target] { Tensor(target).copy_(source); });
  bool own = records(device) && made.count(target.storage().data());
  if (own) recording->results.push_back(target);
  if (own || !records(device)) target.copy_(source);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.numel() == 0) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const Tensor& resize(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto bytes = (size_t)(c10::multiply_integers(sizes) * self.itemsize());
  auto* impl = self.unsafeGetTensorImpl();
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (storage->nbytes() < bytes) {
    OnDevice scope(self.device());
    auto data = allocator.allocate(bytes);
    if (storage->nbytes()) std::memcpy(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(data));
    storage->set_nbytes(bytes);
  }
  impl->set_sizes_contiguous(sizes);
  return self;
}

Tensor& set_storage_offset(Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(source);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                                    offset.guard_int(__FILE__, __LINE__));
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source) {
  int64_t values = source.nbytes() / self.itemsize();
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(source);
  self.unsafeGetTensorImpl()->set_storage_offset(0);
  self.unsafeGetTensorImpl()->set_sizes_contiguous({values});
  return self;
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(source.storage());
  self.unsafeGetTensorImpl()->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return self;
}

Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  std::optional<int64_t> at;
  if (offset) at = offset->guard_int(__FILE__, __LINE__);
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), at);
}
Tensor view(const Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }
Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
Tensor unfold(const Tensor& self, int64_t dim, int64_t size, int64_t step) { return at::native::unfold(self, dim, size, step); }

// Runs f on the host, now and at every replay, and returns its results on the device.
std::vector<Tensor> launched(const std::string& what, c10::Device device, const std::function<std::vector<Tensor>()>& f) {
  launch(what);
  auto run = [f] {
    at::AutoDispatchBelowADInplaceOrView below;
    return f();
  };
  auto values = run();
  std::vector<Tensor> results;
  for (auto& value : values) results.push_back(value.defined() ? to_device(value, device) : value);
  if (records(device)) {
    for (auto& value : values)
      if (value.defined()) recording->results.push_back(value);
    recording->steps.emplace_back([run, values] {
      auto again = run();
      for (size_t i = 0; i < again.size(); i++)
        if (again[i].defined()) Tensor(values[i]).copy_(again[i]);
    });
  }
  return results;
}

void check_convolution(const std::vector<Tensor>& tensors) {
  for (auto& t : tensors)
    if (t.device() != tensors[0].device()) fault(mixed(tensors[0].device().str(), t.device().str(), "aten::convolution"));
}

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  bool biased = bias && bias->defined();
  check_convolution(biased ? std::vector<Tensor>{x, weight, *bias} : std::vector<Tensor>{x, weight});
  auto host_bias = biased ? std::optional<Tensor>(to_host(*bias)) : std::nullopt;
  return launched("aten::convolution", x.device(), [=, s = stride.vec(), p = padding.vec(), d = dilation.vec(), o = output_padding.vec(),
                                                    a = to_host(x), w = to_host(weight)] {
    return std::vector<Tensor>{at::convolution(a, w, host_bias, s, p, d, transposed, o, groups)};
  })[0];
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, at::IntArrayRef stride,
                                                        at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                                                        at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  check_convolution({x, weight, grad});
  std::vector<int64_t> outputs{weight.size(transposed ? 1 : 0) * (transposed ? groups : 1)};
  auto results = launched("aten::convolution_backward", x.device(),
                          [=, s = stride.vec(), p = padding.vec(), d = dilation.vec(), o = output_padding.vec(), g = to_host(grad),
                           a = to_host(x), w = to_host(weight)] {
                            auto sizes = mask[2] ? at::OptionalIntArrayRef(outputs) : at::OptionalIntArrayRef(std::nullopt);
                            auto [first, second, third] = at::convolution_backward(g, a, w, sizes, s, p, d, transposed, o, groups, mask);
                            return std::vector<Tensor>{first, second, third};
                          });
  return {results[0], results[1], results[2]};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_storage_offset);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  // Torch would take these apart on a device without kernels; a GPU has one kernel for a whole list.
  for (const auto& op : c10::Dispatcher::singleton().getAllOpNames())
    if (op.name.rfind("aten::_foreach_", 0) == 0) {
      auto name = op.name.substr(6) + (op.overload_name.empty() ? "" : "." + op.overload_name);
      m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
    }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

// ------------------------------------------------------------------------------------------- what ``device.py`` calls

c10::Dict<std::string, int64_t> counted(const std::string& kind) {
  std::lock_guard<std::mutex> hold(guard);
  c10::Dict<std::string, int64_t> found;
  for (auto& [what, times] : counts[kind]) found.insert(what, times);
  return found;
}

int64_t begin_recording() {
  TORCH_CHECK(!recording, "a graph is being recorded");
  static int64_t last = 0;
  graphs[++last] = std::make_unique<Graph>();
  recording = graphs[last].get();
  recorded_device = current;
  made.clear();
  return last;
}

void end_recording() {
  auto* ended = recording;
  recording = nullptr;
  made.clear();
  for (auto& t : ended->results)  // nothing has run yet
    if (t.is_floating_point()) t.fill_(std::numeric_limits<double>::quiet_NaN());
}

void replay(int64_t graph) {
  launch("replay");
  c10::InferenceMode none(false);
  at::NoGradGuard no_grad;
  for (auto& step : graphs.at(graph)->steps) step();
}

TORCH_LIBRARY(pretend, m) {
  m.def("counted(str kind) -> Dict(str, int)", counted);
  m.def("clear() -> ()", [] {
    std::lock_guard<std::mutex> hold(guard);
    counts.clear();
  });
  m.def("place_launches(bool on) -> ()", [](bool on) { place_launches = on; });
  m.def("refuse_waits(bool on) -> ()", [](bool on) { refuse_waits = on; });
  m.def("refuses_waits() -> bool", [] { return refuse_waits.load(); });
  m.def("held(int device) -> int", [](int64_t device) { return held[device].load(); });
  m.def("peak(int device) -> int", [](int64_t device) { return peak[device].load(); });
  m.def("reset_peak(int device) -> ()", [](int64_t device) { peak[device] = held[device].load(); });
  m.def("limit(int device) -> int", [](int64_t device) { return limit[device].load(); });
  m.def("set_limit(int device, int bytes) -> ()", [](int64_t device, int64_t bytes) { limit[device] = bytes; });
  m.def("current() -> int", [] { return (int64_t)current; });
  m.def("set_current(int device) -> ()", [](int64_t device) { current = (c10::DeviceIndex)device; });
  m.def("state(int device) -> Tensor", [](int64_t device) {
    return states[device].defined() ? states[device].clone() : at::empty({0}, at::kByte);
  });
  m.def("set_state(int device, Tensor state) -> ()", [](int64_t device, const Tensor& state) { states[device] = state.clone(); });
  m.def("begin_recording() -> int", begin_recording);
  m.def("end_recording() -> ()", end_recording);
  m.def("replay(int graph) -> ()", replay);
  m.def("forget(int graph) -> ()", [](int64_t graph) { graphs.erase(graph); });
}

}  // namespace

extern "C" void pretend_begin(FindPlace place) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  find_place = place;
}
