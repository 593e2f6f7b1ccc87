// Run a compiled package of `sbpatch export --compile` on images, without Python:
//
//     run_pt2 patched.pt2 CHANNELS HEIGHT WIDTH < images.f32 > answers.txt
//
// images.f32 holds float32 values, sample after sample, as many samples as there are; of each a line of logits comes out.
// docs/deployment.md has the command that compiles this against the libraries in torch's Python package.

#include <cstdlib>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "use: run_pt2 PACKAGE CHANNELS HEIGHT WIDTH < images.f32\n";
    return 2;
  }
  const long channels = std::atol(argv[2]), height = std::atol(argv[3]), width = std::atol(argv[4]);
  std::vector<char> bytes(std::istreambuf_iterator<char>(std::cin), {});
  const long sample = channels * height * width * static_cast<long>(sizeof(float));
  if (sample <= 0 || bytes.empty() || static_cast<long>(bytes.size()) % sample != 0) {
    std::cerr << "standard input holds no whole number of samples\n";
    return 1;
  }
  try {
    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    const long count = static_cast<long>(bytes.size()) / sample;
    const at::Tensor images = at::from_blob(bytes.data(), {count, channels, height, width}, at::kFloat);
    const at::Tensor answers = model.run({images})[0].to(at::kFloat).contiguous();
    for (long row = 0; row < answers.size(0); ++row) {
      for (long column = 0; column < answers.size(1); ++column) {
        std::cout << (column ? " " : "") << answers[row][column].item<float>();
      }
      std::cout << '\n';
    }
  } catch (const std::exception& error) {
    const std::string text = error.what();
    std::cerr << text.substr(0, text.find('\n')) << '\n';  // below it stands where in PyTorch
    return 1;
  }
}
