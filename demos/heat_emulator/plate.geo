// A unit-size plate with three holes of different size and shape.
// Mesh it with:  gmsh -2 plate.geo -format msh41 -o plate.msh   (plate.msh is by Gmsh 4.15.2)
SetFactory("OpenCASCADE");

far = 0.036;   // mesh size in the open plate
near = 0.022;  // mesh size at the holes

Rectangle(1) = {0, 0, 0, 1, 1};
Disk(2) = {0.30, 0.68, 0, 0.14};            // large hole
Disk(3) = {0.74, 0.76, 0, 0.07};            // small hole
Disk(4) = {0.62, 0.28, 0, 0.20, 0.08};      // long hole
BooleanDifference(5) = { Surface{1}; Delete; }{ Surface{2:4}; Delete; };

// The curves of the plate's rim are those on the edges of the unit square; the others belong to holes.
eps = 1e-6;
rim() = Curve In BoundingBox{-eps, -eps, -eps, 1 + eps, eps, eps};
rim() += Curve In BoundingBox{-eps, 1 - eps, -eps, 1 + eps, 1 + eps, eps};
rim() += Curve In BoundingBox{-eps, -eps, -eps, eps, 1 + eps, eps};
rim() += Curve In BoundingBox{1 - eps, -eps, -eps, 1 + eps, 1 + eps, eps};
holes() = Boundary{ Surface{5}; };
holes() = Abs(holes());
holes() -= rim();

Physical Surface("plate", 1) = {5};
Physical Curve("rim", 2) = {rim()};
Physical Curve("holes", 3) = {holes()};

Field[1] = Distance;
Field[1].CurvesList = {holes()};
Field[1].Sampling = 200;
Field[2] = Threshold;
Field[2].InField = 1;
Field[2].SizeMin = near;
Field[2].SizeMax = far;
Field[2].DistMin = 0.02;
Field[2].DistMax = 0.15;
Background Field = 2;
Mesh.MeshSizeExtendFromBoundary = 0;
Mesh.MeshSizeFromPoints = 0;
Mesh.Algorithm = 6;  // Frontal-Delaunay
