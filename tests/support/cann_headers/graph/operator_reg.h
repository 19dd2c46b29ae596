// A stand-in for CANN's graph/operator_reg.h: each macro gives something that a compiler can check the arguments of.
#ifndef STAND_IN_GRAPH_OPERATOR_REG_H
#define STAND_IN_GRAPH_OPERATOR_REG_H

#include "graph/operator.h"

namespace ge {
class Prototype {
 public:
  Prototype &Tensor(const char *name, const TensorType &types);
  Prototype &Attribute(const char *name, const std::string *kind);
};
using String = std::string;
}  // namespace ge

#define REG_OP(type) inline void type##Prototype(Prototype &prototype) { prototype
#define INPUT(name, types) Tensor(#name, types)
#define OPTIONAL_INPUT(name, types) Tensor(#name, types)
#define OUTPUT(name, types) Tensor(#name, types)
#define REQUIRED_ATTR(name, kind) Attribute(#name, static_cast<const kind *>(nullptr))
#define OP_END_FACTORY_REG(type) Attribute(#type, nullptr); }

#define IMPLEMT_COMMON_INFERFUNC(name) static graphStatus name(Operator &op)
#define IMPLEMT_VERIFIER(type, name) static graphStatus name(Operator &op)
#define COMMON_INFER_FUNC_REG(type, name) graphStatus (*type##_infer)(Operator &) = name
#define VERIFY_FUNC_REG(type, name) graphStatus (*type##_verify)(Operator &) = name

#endif
