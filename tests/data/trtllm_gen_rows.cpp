// The rows mxfp8, mxfp4, mxfp4_w4a16 and fp8_block of trtllm_gen_kernels.json, asked of the library itself on the host.
// Needs the export headers and flashinferMetaInfo.h of flashinfer-cubin 0.6.13 (batched_gemm-91e0ba0-896b90b) and the
// headers of CUDA; the driver functions that they name are never called, so they may be stubs when it is linked:
//     g++ -std=c++17 -DTLLM_ENABLE_CUDA -DTLLM_GEN_GEMM_CUBIN_PATH='""' -I HEADERS -I CUDA/include trtllm_gen_rows.cpp stubs.c -o rows && ./rows sizes.txt
// sizes.txt: one "hidden intermediate" a line. Prints format, activation, hidden, intermediate, token tiles.
#include <cuda.h>
#include <cuda_runtime_api.h>
#define TLLM_GEN_EXPORT_INTERFACE
#define TLLM_GEN_EXPORT_FLASHINFER
#include <cstdio>
#include <set>
#include <fstream>
#include "flashinfer/trtllm/batched_gemm/trtllmGen_bmm_export/BatchedGemmInterface.h"
using namespace ::batchedGemm::batchedGemm;
using namespace ::batchedGemm;
namespace tgx = ::batchedGemm::trtllm::gen;
struct Opt { tgx::Dtype a,b,c; bool ds; bool fused; bool route; int elt; int tile; int epi; bool shuf; };
std::vector<int> passing(Opt o){
  auto bmm=BatchedGemmInterface(); auto cs=bmm.getBatchedGemmConfigs(); std::vector<int> r;
  for(size_t i=0;i<bmm.getNumBatchedGemmConfigs();++i){ auto const& p=cs[i].mOptions;
    if(p.mDtypeA!=o.a||p.mDtypeB!=o.b||p.mDtypeC!=o.c||p.mUseDeepSeekFp8!=o.ds||!p.mTransposeMmaOutput) continue;
    if((!doesRouteImplUseNoRoute(p.mRouteImpl))!=o.route||p.mFusedAct!=o.fused||p.mIsStaticBatch||p.mTileN!=o.tile||p.mUseShuffledMatrix!=o.shuf) continue;
    if((int)p.mLayoutA!=0) continue;
    if(p.mBiasType==gemm::BiasType::Mn) continue;
    if(p.mFusedAct && (int)p.mActType!=0) continue;
    if((int)p.mEltwiseActType!=o.elt) continue;
    if(p.mEpilogueTileM!=o.epi||p.mClusterDimZ>1) continue;
    r.push_back(i);} return r; }
bool any(std::vector<int> const& ids,int tokens,int n,int k,int E,int ctas){
  auto bmm=BatchedGemmInterface(); auto cs=bmm.getBatchedGemmConfigs();
  BatchedGemmData d{}; auto& q=d.mProblemDimensions; q.mNumBatches=E;q.mNumTokens=tokens;q.mBatchM=false;q.mM=n;q.mN=tokens;q.mK=k;q.mRank=0;q.mWorldSize=1;q.mMaxNumCtasInTokenDim=ctas;q.mValidM=n;q.mValidN=tokens;q.mValidK=k;
  for(int i:ids) if(bmm.isValidConfig(cs[i],d)) return true; return false; }
int main(int argc,char**argv){
  int relu2=(int)gemm::EltwiseActType::Relu2, none=(int)gemm::EltwiseActType::None;
  auto B=tgx::Dtype::Bfloat16, X=tgx::Dtype::MxE4m3, F=tgx::Dtype::MxE2m1, Q=tgx::Dtype::E4m3;
  std::ifstream in(argv[1]); int h,i; std::vector<std::pair<int,int>> sizes; while(in>>h>>i) sizes.push_back({h,i});
  struct K{const char* f; const char* a; tgx::Dtype w,x; bool ds; bool gated;};
  for(K k: {K{"mxfp8","swiglu",X,X,false,true},K{"mxfp8","relu2",X,X,false,false},K{"mxfp4","swiglu",F,X,false,true},K{"mxfp4","relu2",F,X,false,false},K{"mxfp4_w4a16","swiglu",F,B,false,true},K{"fp8_block","swiglu",Q,Q,true,true}})
   { std::vector<std::pair<int,std::pair<std::vector<int>,std::vector<int>>>> t;
     for(int tile:{8,16,32,64,128,192,256}){
       auto g1=passing({k.w,k.x,k.x,k.ds,!k.ds&&k.gated,true,k.gated?none:relu2,tile,k.ds?64:128,!k.ds});
       auto g2=passing({k.w,k.x,B,k.ds,false,false,none,tile,k.ds?64:128,!k.ds});
       t.push_back({tile,{g1,g2}}); fprintf(stderr,"%s %s tile %d: %zu %zu\n",k.f,k.a,tile,g1.size(),g2.size()); }
     for(auto [h,i]:sizes){ printf("%s %s %d %d",k.f,k.a,h,i);
       for(auto&[tile,g]:t) if(any(g.first,128,(k.gated?2:1)*i,h,128,512) && any(g.second,128,h,i,128,512)) printf(" %d",tile);
       printf("\n"); } } }
