// A stand-in for CANN's register/register.h, for a syntax check only.
#ifndef STAND_IN_REGISTER_REGISTER_H
#define STAND_IN_REGISTER_REGISTER_H

#include "graph/operator.h"

namespace domi {
using Status = uint32_t;
constexpr Status SUCCESS = 0;
constexpr Status FAILED = 1;
enum FrameworkType { ONNX = 5 };
enum class ImplyType { TVM = 1 };
using ParseByOperator = Status (*)(const ge::Operator &, ge::Operator &);

class OpRegistrationData {
 public:
  explicit OpRegistrationData(const std::string &type);
  OpRegistrationData &FrameworkType(const domi::FrameworkType &type);
  OpRegistrationData &OriginOpType(const std::initializer_list<std::string> &types);
  OpRegistrationData &ParseParamsByOperatorFn(const ParseByOperator &parse);
  OpRegistrationData &ImplyType(const domi::ImplyType &type);
};
}  // namespace domi

#define STAND_IN_JOIN(a, b) a##b
#define STAND_IN_NAME(a, b) STAND_IN_JOIN(a, b)
#define REGISTER_CUSTOM_OP(type) static OpRegistrationData STAND_IN_NAME(registered, __COUNTER__) = OpRegistrationData(type)

#endif
