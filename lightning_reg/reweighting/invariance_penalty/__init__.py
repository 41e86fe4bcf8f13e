"""Penalties that hold a network to what is alike in all training environments: IRM, V-REx, SD, IGA, Fishr, CLOvE."""
