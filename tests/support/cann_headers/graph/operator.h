// A stand-in for CANN's graph/operator.h: the declarations that the generated files use, for a syntax check only.
#ifndef STAND_IN_GRAPH_OPERATOR_H
#define STAND_IN_GRAPH_OPERATOR_H

#include <cstdint>
#include <string>
#include <vector>

namespace ge {
using graphStatus = uint32_t;
constexpr graphStatus GRAPH_SUCCESS = 0;
constexpr graphStatus GRAPH_FAILED = 0xFFFFFFFF;

enum DataType { DT_FLOAT = 0, DT_FLOAT16 = 1, DT_INT32 = 3, DT_UINT8 = 4 };
enum Format { FORMAT_ND = 2 };

class AscendString {
 public:
  AscendString() = default;
  AscendString(const char *text);
  const char *GetString() const;
};

class Shape {
 public:
  explicit Shape(const std::vector<int64_t> &dims);
  std::vector<int64_t> GetDims() const;
};

class TensorDesc {
 public:
  Shape GetShape() const;
  void SetShape(const Shape &shape);
  void SetDataType(DataType type);
  void SetFormat(Format format);
};

class TensorType {
 public:
  TensorType(const std::initializer_list<DataType> &types);
};

class Operator {
 public:
  TensorDesc GetInputDescByName(const char *name) const;
  TensorDesc GetOutputDescByName(const char *name) const;
  graphStatus UpdateOutputDesc(const char *name, const TensorDesc &desc);
  graphStatus GetAttr(const char *name, AscendString &value) const;
  Operator &SetAttr(const char *name, const AscendString &value);
};
}  // namespace ge

#endif
