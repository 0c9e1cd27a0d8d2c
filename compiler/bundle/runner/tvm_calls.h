// Calls into TVM's runtime through the C interface of tvm-ffi: values, functions, methods, the virtual machine.
//
// A call that fails returns false and leaves the runtime's message in a Message. No C++ standard library is used, so
// that any C++17 compiler builds this in a second, also for another machine.
#pragma once

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

namespace tvm_calls {

struct Message {
  char text[1024];
};

template <typename Cell>
Cell* CellOf(TVMFFIObject* object) {
  return reinterpret_cast<Cell*>(reinterpret_cast<char*>(object) + sizeof(TVMFFIObject));
}

inline TVMFFIAny None() {
  TVMFFIAny any;
  memset(&any, 0, sizeof(any));
  return any;
}

inline TVMFFIAny Int(int64_t value) {
  TVMFFIAny any = None();
  any.type_index = kTVMFFIInt;
  any.v_int64 = value;
  return any;
}

inline TVMFFIAny Bool(bool value) {
  TVMFFIAny any = Int(value);
  any.type_index = kTVMFFIBool;
  return any;
}

inline TVMFFIAny String(const char* text) {
  TVMFFIAny any = None();
  any.type_index = kTVMFFIRawStr;
  any.v_c_str = text;
  return any;
}

inline TVMFFIAny Object(TVMFFIObjectHandle handle) {
  TVMFFIAny any = None();
  any.v_obj = static_cast<TVMFFIObject*>(handle);
  any.type_index = any.v_obj->type_index;
  return any;
}

inline void Release(TVMFFIAny* any) {
  if (any->type_index >= kTVMFFIStaticObjectBegin) TVMFFIObjectDecRef(any->v_obj);
  *any = None();
}

inline bool Succeeded(int code, const char* what, Message* message) {
  if (code == 0) return true;
  TVMFFIObjectHandle error = nullptr;
  TVMFFIErrorMoveFromRaised(&error);
  if (error == nullptr) {
    snprintf(message->text, sizeof(message->text), "%s: unknown error", what);
    return false;
  }
  const TVMFFIByteArray& text = CellOf<TVMFFIErrorCell>(static_cast<TVMFFIObject*>(error))->message;
  snprintf(message->text, sizeof(message->text), "%s: %.*s", what, static_cast<int>(text.size), text.data);
  TVMFFIObjectDecRef(error);
  return false;
}

inline bool Call(TVMFFIObjectHandle function, TVMFFIAny* arguments, int count, TVMFFIAny* result, const char* what,
                 Message* message) {
  *result = None();
  return Succeeded(TVMFFIFunctionCall(function, arguments, count, result), what, message);
}

inline bool Global(const char* name, TVMFFIObjectHandle* function, Message* message) {
  TVMFFIByteArray key = {name, strlen(name)};
  *function = nullptr;
  if (!Succeeded(TVMFFIFunctionGetGlobal(&key, function), name, message)) return false;
  if (*function == nullptr) snprintf(message->text, sizeof(message->text), "the runtime has no function %s", name);
  return *function != nullptr;
}

// Calls a function of the runtime by its name.
inline bool CallGlobal(const char* name, TVMFFIAny* arguments, int count, TVMFFIAny* result, const char* what,
                       Message* message) {
  TVMFFIObjectHandle function = nullptr;
  if (!Global(name, &function, message)) return false;
  bool done = Call(function, arguments, count, result, what, message);
  TVMFFIObjectDecRef(function);
  return done;
}

inline bool Method(const TVMFFIAny& module, const char* name, TVMFFIObjectHandle* function, Message* message) {
  TVMFFIAny arguments[] = {module, String(name), Bool(true)};
  TVMFFIAny found;
  if (!CallGlobal("ffi.ModuleGetFunction", arguments, 3, &found, name, message)) return false;
  *function = found.v_obj;
  if (found.type_index == kTVMFFIFunction) return true;
  Release(&found);
  snprintf(message->text, sizeof(message->text), "the library has no function %s", name);
  return false;
}

inline bool CallMethod(const TVMFFIAny& module, const char* name, TVMFFIAny* arguments, int count, TVMFFIAny* result,
                       Message* message) {
  TVMFFIObjectHandle function = nullptr;
  if (!Method(module, name, &function, message)) return false;
  bool done = Call(function, arguments, count, result, name, message);
  TVMFFIObjectDecRef(function);
  return done;
}

inline TVMFFIAny Device(int kind) {
  TVMFFIAny any = None();
  any.type_index = kTVMFFIDevice;
  any.v_device.device_type = static_cast<DLDeviceType>(kind);
  any.v_device.device_id = 0;
  return any;
}

// Waits until a device has done everything.
inline bool Wait(int device, Message* message) {
  TVMFFIAny arguments[] = {Device(device), Int(0)}, nothing;
  const char* name = "runtime.Device_StreamSync";
  return CallGlobal(name, arguments, 2, &nothing, name, message);
}

// Copies a tensor into new memory of a device, or of the processor, and waits for it.
inline bool CopyTensor(const TVMFFIAny& tensor, int device, TVMFFIAny* copy, Message* message) {
  constexpr int kMostDimensions = 32;
  const DLTensor& from = *CellOf<DLTensor>(tensor.v_obj);
  TVMFFIAny sizes[kMostDimensions], shape, nothing, type = None();
  *copy = None();
  if (from.ndim > kMostDimensions) {
    snprintf(message->text, sizeof(message->text), "a tensor of %d dimensions", from.ndim);
    return false;
  }
  for (int i = 0; i < from.ndim; ++i) sizes[i] = Int(from.shape[i]);
  if (!CallGlobal("ffi.Shape", sizes, from.ndim, &shape, "ffi.Shape", message)) return false;
  type.type_index = kTVMFFIDataType;
  type.v_dtype = from.dtype;
  const char *allocate = "runtime.TVMTensorAllocWithScope", *fill = "runtime.TVMTensorCopyFromTo";
  TVMFFIAny what[] = {shape, type, Device(device), None()};
  bool done = CallGlobal(allocate, what, 4, copy, allocate, message);
  Release(&shape);
  if (!done) return false;
  TVMFFIAny both[] = {tensor, *copy};
  const int waiting = device == kDLCPU ? static_cast<int>(from.device.device_type) : device;
  if (CallGlobal(fill, both, 2, &nothing, fill, message) && (waiting == kDLCPU || Wait(waiting, message))) return true;
  Release(copy);
  return false;
}

// Loads what the runtime needs for a device; it lies beside the program or the library that asks for it.
inline bool LoadDevice(int device, Message* message) {
  if (device == kDLCPU || dlopen("libtvm_runtime_cuda.so", RTLD_NOW | RTLD_GLOBAL) != nullptr) return true;
  snprintf(message->text, sizeof(message->text), "%s", dlerror());
  return false;
}

// Makes a virtual machine for a loaded library, on the processor or on a device.
inline bool MakeMachine(const TVMFFIAny& library, TVMFFIAny* machine, Message* message, int device = kDLCPU) {
  if (!CallMethod(library, "vm_load_executable", nullptr, 0, machine, message)) return false;
  constexpr int kPooledAllocator = 2;
  // A device comes first; the processor, which calls its kernels, behind it.
  TVMFFIAny devices[] = {Int(device), Int(0), Int(kPooledAllocator), Int(kDLCPU), Int(0), Int(kPooledAllocator)};
  TVMFFIAny nothing;
  if (CallMethod(*machine, "vm_initialization", devices, device == kDLCPU ? 3 : 6, &nothing, message)) return true;
  Release(machine);
  return false;
}

}  // namespace tvm_calls
