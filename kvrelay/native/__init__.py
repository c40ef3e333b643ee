"""The forward pass for CPUs with AVX-512 and bfloat16, in C++: built at install, loaded here."""
