"""What fp4moe knows of other libraries' models, one file each."""
