"""The protocols included in rtservice: ordinary Twisted protocols and factories."""
