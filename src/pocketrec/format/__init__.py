"""What a file is: blocks, layouts, vocabulary, program; read with numpy or the kernel, torch-free."""
